// Graph capture is not emulated. The only function here answers that no stream is being captured.
#include "acl/acl.h"
#include "acl/acl_mdl.h"

aclError aclmdlRICaptureGetInfo(aclrtStream, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
  *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph != nullptr) *graph = nullptr;
  return ACL_SUCCESS;
}
