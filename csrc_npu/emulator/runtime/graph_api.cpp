// ACL's functions of graphs.
#include <cstdio>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "acl/acl_mdl.h"
#include "graph.h"

using namespace vllm_npu::emulator;

namespace {

std::mutex tables_mutex;

std::unordered_map<aclmdlRI, std::shared_ptr<Graph>>& graphs() {
  static auto* table = new std::unordered_map<aclmdlRI, std::shared_ptr<Graph>>;  // outlives the streams' threads
  return *table;
}

std::unordered_map<aclrtTaskGrp, std::unique_ptr<TaskGroup>>& groups() {
  static auto* table = new std::unordered_map<aclrtTaskGrp, std::unique_ptr<TaskGroup>>;
  return *table;
}

std::shared_ptr<Graph> find_graph(const char* function, aclmdlRI handle, int& code) {
  const std::lock_guard<std::mutex> lock(tables_mutex);
  const auto found = graphs().find(handle);
  if (found != graphs().end()) return found->second;
  code = fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is no graph, or one that has been destroyed", function, handle);
  return nullptr;
}

// Returns the graph that the stream is captured into, or null with an error.
std::shared_ptr<Graph> find_capture(const char* function, const std::shared_ptr<Stream>& stream, int& code) {
  auto graph = stream->capture();
  if (graph == nullptr) {
    code = fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "%s: stream %d is not being captured", function, stream->id());
  }
  return graph;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

// Replaces the group's work by the recorded tasks, when the stream reaches this point.
int update_group(const std::shared_ptr<Stream>& stream, const TaskGroup& group, std::vector<Recorded> tasks) {
  const auto graph = group.graph.lock();
  if (graph == nullptr) {
    return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED, "aclmdlRICaptureTaskUpdateEnd: the group's graph has been destroyed");
  }
  const std::vector<std::string> captured = graph->names_of(group.nodes);
  std::vector<std::string> given;
  for (const Recorded& task : tasks) given.emplace_back(task.name);
  if (given != captured) {
    return fail(ACL_ERROR_RT_MODEL_UPDATE_FAILED,
                "aclmdlRICaptureTaskUpdateEnd: the group has the tasks %s and the update has %s; an update changes the "
                "arguments of tasks only",
                joined(captured).c_str(), joined(given).c_str());
  }
  const auto replace = [graph, nodes = group.nodes, tasks = std::move(tasks)] { return graph->replace(nodes, tasks); };
  return stream->enqueue("aclmdlRICaptureTaskUpdateEnd", replace, Pace::kAtOnce);
}

}  // namespace

aclError aclmdlRICaptureBegin(aclrtStream handle, aclmdlRICaptureMode mode) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  if (handle == nullptr) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "%s: the default stream cannot be captured; use another one",
                __func__);
  }
  if (stream->capture() != nullptr) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "%s: stream %d is being captured", __func__, stream->id());
  }
  auto graph = std::make_shared<Graph>(stream, mode);
  trace(__func__, "graph=%u stream=%d mode=%d", graph->id(), stream->id(), mode);
  stream->set_capture(graph);
  const std::lock_guard<std::mutex> lock(tables_mutex);
  graphs()[graph.get()] = graph;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream handle, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  const auto capture = stream->capture();
  if (graph != nullptr) *graph = capture.get();
  *status = capture == nullptr            ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : capture->is_invalidated() ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                                        : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream handle, aclmdlRI* graph) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  const auto capture = find_capture(__func__, stream, code);
  if (capture == nullptr) return code;
  *graph = nullptr;
  code = capture->end(stream);
  trace(__func__, "graph=%u code=%d", capture->id(), code);
  if (code == ACL_SUCCESS) {
    *graph = capture.get();
  } else if (stream->capture() == nullptr) {  // the capture is over, and has failed
    const std::lock_guard<std::mutex> lock(tables_mutex);
    graphs().erase(capture.get());
  }
  return code;
}

aclError aclmdlRIGetId(aclmdlRI handle, uint32_t* id) {
  int code = ACL_SUCCESS;
  const auto graph = find_graph(__func__, handle, code);
  if (graph != nullptr) *id = graph->id();
  return code;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream_handle) {
  int code = ACL_SUCCESS;
  const auto graph = find_graph(__func__, handle, code);
  const auto stream = graph == nullptr ? nullptr : find_stream(stream_handle, code);
  if (stream == nullptr) return code;
  if (graph->device() != stream->device()) {
    return fail(ACL_ERROR_RT_STREAM_CONTEXT, "%s: the graph is of device %d and the stream of device %d", __func__,
                graph->device(), stream->device());
  }
  if (stream->capture() != nullptr) return stream->refuse_while_captured(__func__);
  return graph->execute(stream);
}

// A replay that has not finished keeps the graph until its end.
aclError aclmdlRIDestroy(aclmdlRI handle) {
  int code = ACL_SUCCESS;
  const auto graph = find_graph(__func__, handle, code);
  if (graph == nullptr) return code;
  trace(__func__, "graph=%u", graph->id());
  const std::lock_guard<std::mutex> lock(tables_mutex);
  graphs().erase(handle);
  std::erase_if(groups(), [&](const auto& entry) { return entry.second->graph.lock() == graph; });
  return ACL_SUCCESS;
}

aclError aclmdlRIDebugPrint(aclmdlRI handle) {
  int code = ACL_SUCCESS;
  const auto graph = find_graph(__func__, handle, code);
  if (graph != nullptr) std::fputs(graph->as_json().c_str(), stdout);
  return code;
}

aclError aclmdlRIDebugJsonPrint(aclmdlRI handle, const char* path, uint32_t) {
  int code = ACL_SUCCESS;
  const auto graph = find_graph(__func__, handle, code);
  if (graph == nullptr) return code;
  std::FILE* file = std::fopen(path, "w");
  if (file == nullptr) return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: cannot write %s", __func__, path);
  std::fputs(graph->as_json().c_str(), file);
  std::fclose(file);
  return ACL_SUCCESS;
}

// --- Groups of tasks, whose arguments can change between replays ---

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream handle) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  const auto graph = stream == nullptr ? nullptr : find_capture(__func__, stream, code);
  return graph == nullptr ? code : graph->begin_group(stream);
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream handle, aclrtTaskGrp* group) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  const auto graph = stream == nullptr ? nullptr : find_capture(__func__, stream, code);
  if (graph == nullptr) return code;
  TaskGroup* made = nullptr;
  code = graph->end_group(stream, made);
  if (code != ACL_SUCCESS) return code;
  const std::lock_guard<std::mutex> lock(tables_mutex);
  *group = made;
  groups()[*group].reset(made);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group_handle) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  if (stream->capture() != nullptr) return stream->refuse_while_captured(__func__);
  const std::lock_guard<std::mutex> lock(tables_mutex);
  const auto group = groups().find(group_handle);
  if (group == groups().end()) {
    return fail(ACL_ERROR_RT_PARAM_INVALID, "%s: %p is no group of tasks", __func__, group_handle);
  }
  return stream->begin_update(*group->second);
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream handle) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  if (stream == nullptr) return code;
  const auto update = stream->end_update();
  if (update == nullptr) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "%s: stream %d has no update", __func__, stream->id());
  }
  return update_group(stream, update->group, std::move(update->tasks));
}
