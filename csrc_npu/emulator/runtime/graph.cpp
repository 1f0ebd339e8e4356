#include "graph.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <unordered_set>

#include "device.h"

namespace vllm_npu::emulator {
namespace {

std::atomic<std::uint32_t> graphs_made{0};

// The graphs that are being captured. Never destroyed, like the table of streams.
class Captures {
 public:
  static Captures& instance() {
    static auto* captures = new Captures;
    return *captures;
  }

  void add(Graph* graph) {
    const std::lock_guard<std::mutex> lock(mutex_);
    graphs_.insert(graph);
  }

  void remove(Graph* graph) {
    const std::lock_guard<std::mutex> lock(mutex_);
    graphs_.erase(graph);
  }

  // Returns a capture that meets the condition, or null. The graph lives while its capture does.
  std::shared_ptr<Graph> find(const std::function<bool(const Graph&)>& condition) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Graph* graph : graphs_) {
      if (condition(*graph)) return graph->shared_from_this();
    }
    return nullptr;
  }

 private:
  std::mutex mutex_;
  std::unordered_set<Graph*> graphs_;
};

thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

void merge(LaneCounts& into, const LaneCounts& from) {
  for (const auto& [lane, count] : from) into[lane] = std::max(into[lane], count);
}

void keep_device_memory(Addresses& memory) {
  std::erase_if(memory, [](const void* address) { return !find_device_memory(address); });
}

std::shared_ptr<const Recorded> named(const char* name) {
  return std::make_shared<const Recorded>(Recorded{name, nullptr, {}});
}

int check_memory(const Recorded& task) {
  for (const void* address : task.memory) {
    if (find_device_memory(address)) continue;
    return fail(ACL_ERROR_RT_PARAM_INVALID,
                "%s: the memory at %p has been freed since the capture; keep all tensors of a graph alive, or make them "
                "inside the capture",
                task.name.c_str(), address);
  }
  return ACL_SUCCESS;
}

}  // namespace

Graph::Graph(std::shared_ptr<Stream> origin, aclmdlRICaptureMode mode)
    : id_(++graphs_made), origin_(std::move(origin)), mode_(mode) {
  lanes_.push_back({origin_, {}, 0, {}, false});
  Captures::instance().add(this);
}

// The caller holds the mutex.
std::size_t Graph::lane_of(const std::shared_ptr<Stream>& stream) {
  for (std::size_t lane = 0; lane < lanes_.size(); ++lane) {
    if (lanes_[lane].stream == stream) return lane;
  }
  lanes_.push_back({stream, {}, 0, {}, false});
  stream->set_capture(shared_from_this());
  return lanes_.size() - 1;
}

int Graph::add(const std::shared_ptr<Stream>& stream, Recorded task, Place place) {
  keep_device_memory(task.memory);
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t index = lane_of(stream);
  Lane& lane = lanes_[index];
  if (lane.in_group) lane.group.push_back(nodes_.size());
  lane.seen[index] = ++lane.nodes;
  if (place == Place::kStreamThread) needs_thread_ = true;
  nodes_.push_back({Kind::kWork, index, std::make_shared<const Recorded>(std::move(task)), 0, {}});
  return ACL_SUCCESS;
}

std::size_t Graph::add_record(const std::shared_ptr<Stream>& stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t lane = lane_of(stream);
  nodes_.push_back({Kind::kRecord, lane, named("aclrtRecordEvent"), 0, lanes_[lane].seen});
  return nodes_.size() - 1;
}

void Graph::add_wait(const std::shared_ptr<Stream>& stream, std::size_t record) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::size_t lane = lane_of(stream);
  merge(lanes_[lane].seen, nodes_[record].before);
  nodes_.push_back({Kind::kWait, lane, named("aclrtStreamWaitEvent"), record, {}});
}

void Graph::invalidate(const std::string& reason) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (capturing_ && invalid_.empty()) invalid_ = reason;
}

bool Graph::is_invalidated() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return !invalid_.empty();
}

bool Graph::is_capturing() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return capturing_;
}

void Graph::release_streams() {
  for (Lane& lane : lanes_) lane.stream->set_capture(nullptr);
  Captures::instance().remove(this);
}

int Graph::end(const std::shared_ptr<Stream>& stream) {
  const auto self = shared_from_this();  // the streams may be the only owners
  const std::lock_guard<std::mutex> lock(mutex_);
  if (stream != origin_) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "aclmdlRICaptureEnd: the capture of stream %d began on stream %d",
                stream->id(), origin_->id());
  }
  if (mode_ != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && !is_of_this_thread()) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD,
                "aclmdlRICaptureEnd: another thread began the capture of stream %d", stream->id());
  }
  capturing_ = false;
  release_streams();
  if (!invalid_.empty()) {
    return fail(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "aclmdlRICaptureEnd: the capture of stream %d is invalid: %s",
                stream->id(), invalid_.c_str());
  }
  for (std::size_t lane = 1; lane < lanes_.size(); ++lane) {
    if (lanes_[0].seen[lane] == lanes_[lane].nodes) continue;
    return fail(ACL_ERROR_RT_STREAM_UNJOINED,
                "aclmdlRICaptureEnd: stream %d joined the capture of stream %d, and its last work was not joined back; "
                "record an event after this work and let stream %d wait for it",
                lanes_[lane].stream->id(), stream->id(), stream->id());
  }
  return ACL_SUCCESS;
}

int Graph::begin_group(const std::shared_ptr<Stream>& stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Lane& lane = lanes_[lane_of(stream)];
  if (lane.in_group) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "aclmdlRICaptureTaskGrpBegin: stream %d has an open group",
                stream->id());
  }
  lane.in_group = true;
  lane.group.clear();
  return ACL_SUCCESS;
}

int Graph::end_group(const std::shared_ptr<Stream>& stream, TaskGroup*& group) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Lane& lane = lanes_[lane_of(stream)];
  if (!lane.in_group) {
    return fail(ACL_ERROR_STREAM_TASK_GROUP_STATUS, "aclmdlRICaptureTaskGrpEnd: stream %d has no open group",
                stream->id());
  }
  lane.in_group = false;
  group = new TaskGroup{weak_from_this(), std::move(lane.group)};
  return ACL_SUCCESS;
}

std::shared_ptr<const Recorded> Graph::task_of(std::size_t node) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return nodes_[node].task;
}

std::vector<std::string> Graph::names_of(const std::vector<std::size_t>& nodes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::string> names;
  for (const std::size_t node : nodes) names.push_back(nodes_[node].task->name);
  return names;
}

int Graph::replace(const std::vector<std::size_t>& nodes, const std::vector<Recorded>& tasks) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    auto task = std::make_shared<Recorded>(tasks[i]);
    keep_device_memory(task->memory);
    nodes_[nodes[i]].task = std::move(task);
  }
  return ACL_SUCCESS;
}

int Graph::run_node(std::size_t node) {
  const std::shared_ptr<const Recorded> task = task_of(node);
  int code = check_memory(*task);
  try {
    if (code == ACL_SUCCESS) code = lanes_[nodes_[node].lane].stream->run_in_graph(task->work);
  } catch (const std::exception& error) {
    code = fail(ACL_ERROR_INTERNAL_ERROR, "%s failed: %s", task->name.c_str(), error.what());
  }
  if (code == ACL_SUCCESS) return code;
  const std::string text = last_error_text();
  return fail(code, "%s (in a replay of graph %u)", text.c_str(), id_);
}

int Graph::run_in_capture_order() {
  for (std::size_t node = 0; node < nodes_.size(); ++node) {
    if (nodes_[node].kind != Kind::kWork) continue;
    if (const int code = run_node(node)) return code;
  }
  return ACL_SUCCESS;
}

int Graph::run_lanes() {
  std::mutex mutex;  // guards the members below
  std::condition_variable changed;
  std::vector<bool> recorded(nodes_.size(), false);
  int first_code = ACL_SUCCESS;
  std::string first_text;

  const auto run_lane = [&](std::size_t lane) {
    for (std::size_t node = 0; node < nodes_.size(); ++node) {
      if (nodes_[node].lane != lane) continue;
      if (nodes_[node].kind == Kind::kWork) {
        lanes_[lane].stream->pause();
        const int code = run_node(node);
        if (code == ACL_SUCCESS) continue;
        const std::lock_guard<std::mutex> lock(mutex);
        if (first_code == ACL_SUCCESS) {
          first_code = code;
          first_text = last_error_text();
        }
        changed.notify_all();
        return;
      }
      std::unique_lock<std::mutex> lock(mutex);
      if (nodes_[node].kind == Kind::kRecord) {
        recorded[node] = true;
        changed.notify_all();
      } else {
        changed.wait(lock, [&] { return recorded[nodes_[node].record] || first_code != ACL_SUCCESS; });
        if (first_code != ACL_SUCCESS) return;
      }
    }
  };

  std::vector<std::thread> threads;
  for (std::size_t lane = 1; lane < lanes_.size(); ++lane) threads.emplace_back(run_lane, lane);
  run_lane(0);
  for (std::thread& thread : threads) thread.join();
  return first_code == ACL_SUCCESS ? ACL_SUCCESS : fail(first_code, "%s", first_text.c_str());
}

int Graph::execute(const std::shared_ptr<Stream>& stream) {
  trace("aclmdlRIExecuteAsync", "graph=%u nodes=%zu stream=%d", id_, nodes_.size(), stream->id());
  const auto run = [self = shared_from_this()] {
    const std::lock_guard<std::mutex> once_at_a_time(self->executing_);
    return streams_are_asynchronous() ? self->run_lanes() : self->run_in_capture_order();
  };
  return stream->enqueue("aclmdlRIExecuteAsync", run, Pace::kRandom,
                         needs_thread_ ? Place::kStreamThread : Place::kCaller);
}

// Events of Chrome's tracing format, as torch_npu's debug_dump reads them. A task's time is its place in the graph.
std::string Graph::as_json() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string text = "[";
  for (std::size_t node = 0; node < nodes_.size(); ++node) {
    text += node == 0 ? "\n" : ",\n";
    text += std::string(" {\"name\": \"") + nodes_[node].task->name + "\", \"ph\": \"X\", \"pid\": " +
            std::to_string(id_) + ", \"tid\": \"stream" + std::to_string(nodes_[node].lane) +
            "\", \"ts\": " + std::to_string(node) + ", \"dur\": 1, \"args\": {}}";
  }
  return text + "\n]\n";
}

int refuse_in_capture(const char* function) {
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  const auto capture = Captures::instance().find([](const Graph& graph) {
    if (graph.mode() == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
    if (graph.is_of_this_thread()) return true;
    return graph.mode() == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL && thread_mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  });
  if (capture == nullptr) return ACL_SUCCESS;
  return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
              "%s: a graph is being captured, and this function does not belong to a stream; call it before or after "
              "the capture, or capture in relaxed mode",
              function);
}

// --- runtime.h ---

bool records_work(aclrtStream handle) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  return stream != nullptr && stream->records_work();
}

int refuse_to_record(aclrtStream handle, const char* what) {
  int code = ACL_SUCCESS;
  const auto stream = find_stream(handle, code);
  return stream == nullptr ? code : stream->refuse_while_captured(what);
}

}  // namespace vllm_npu::emulator

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(vllm_npu::emulator::thread_mode, *mode);
  return ACL_SUCCESS;
}
