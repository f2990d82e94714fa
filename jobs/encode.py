"""`raybge.encode` as a Ray job. Its exit code is the command's.

    ray job submit --working-dir . --runtime-env jobs/runtime_env.yaml -- python jobs/encode.py \\
        --model_name_or_path /shared/runs/base --input_file /shared/corpus --output_file /shared/vectors \\
        --use_gpu --num_workers 8
"""

from raybge.encode import main

if __name__ == "__main__":
    raise SystemExit(main())
