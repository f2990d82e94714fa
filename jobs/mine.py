"""`raybge.mine` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/mine.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 --input_file /shared/train.jsonl --output_file /shared/mined.jsonl \\
        --corpus_data /shared/corpus.jsonl --range_for_sampling 2-100 --negative_number 7
"""

from raybge.mine import main

if __name__ == "__main__":
    raise SystemExit(main())
