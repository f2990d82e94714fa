"""`raybge.tune` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/tune.py \\
        --model_name_or_path BAAI/bge-base-en-v1.5 --train_data /shared/mined.jsonl --output_dir /shared/runs/search \\
        --search "learning_rate=loguniform(1e-6,1e-4)" "temperature=uniform(0.01,0.1)" --num_samples 16 --bf16
"""

from raybge.tune import main

if __name__ == "__main__":
    raise SystemExit(main())
