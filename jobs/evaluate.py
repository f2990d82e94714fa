"""`raybge.evaluate` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/evaluate.py \\
        --model_name_or_path /shared/runs/base --corpus_data /shared/corpus.jsonl --query_data /shared/dev.jsonl \\
        --storage_path /shared/work --metrics_file /shared/runs/base.json
"""

from raybge.evaluate import main

if __name__ == "__main__":
    raise SystemExit(main())
