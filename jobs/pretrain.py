"""`raybge.pretrain` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/pretrain.py \\
        --model_name_or_path bert-base-uncased --train_data /shared/texts.jsonl --output_dir /shared/runs/pretrained \\
        --learning_rate 1e-4 --per_device_train_batch_size 64 --max_seq_length 256 --bf16
"""

from raybge.pretrain import main

if __name__ == "__main__":
    raise SystemExit(main())
