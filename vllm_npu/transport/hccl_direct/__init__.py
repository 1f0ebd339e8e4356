"""HCCL without torch.distributed: operators that call it from C++, and a transport that calls it by ctypes."""
