"""HCCL without torch.distributed: C++ operators that call HCCL, and a transport that calls HCCL through ctypes."""
