"""HCCL without torch.distributed: operators that call it from C++."""
