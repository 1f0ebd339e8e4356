"""`python -m vllm_npu.cli` does the same as the command `vllm-npu`."""

from vllm_npu.cli import main

if __name__ == "__main__":
    main()
