"""`raybge.merge` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/merge.py \\
        --model_names_or_paths /shared/runs/base BAAI/bge-base-en-v1.5 --model_type encoder \\
        --search /shared/dev.jsonl --general /shared/other.jsonl --output_path /shared/runs/mixed
"""

from raybge.merge import main

if __name__ == "__main__":
    raise SystemExit(main())
