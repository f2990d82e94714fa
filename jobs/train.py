"""`raybge.train` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/train.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 --train_data /shared/mined.jsonl --output_dir /shared/runs/base \\
        --learning_rate 1e-5 --per_device_train_batch_size 256 --train_group_size 8 --bf16
"""

from raybge.train import main

if __name__ == "__main__":
    raise SystemExit(main())
