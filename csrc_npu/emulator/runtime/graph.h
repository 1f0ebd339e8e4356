// Captured graphs (ACL's "model runtime instances"): work that streams recorded in place of running it.
//
// Capture. Between aclmdlRICaptureBegin and aclmdlRICaptureEnd a stream runs nothing. It adds its work to the graph. A
// second stream joins the capture when it waits for an event of the captured stream. Each captured stream is one lane of
// the graph. At the end, all lanes must have been joined to the first one, by events too.
//
// Replay. All work of the graph runs as one piece of work of the stream of the replay. With synchronous streams, it runs
// in the order of the capture. With asynchronous streams, each lane has a thread and random delays, and only the events
// of the capture order the lanes. So a missing event shows as a wrong result, as on a device.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "runtime.h"
#include "stream.h"

namespace vllm_npu::emulator {

// The number of nodes of each lane that lie before a point of the graph.
using LaneCounts = std::map<std::size_t, std::size_t>;

// A captured record of an event.
struct CapturedRecord {
  std::weak_ptr<class Graph> graph;
  std::size_t node = 0;
};

// Work that was recorded and did not run.
struct Recorded {
  std::string name;  // a copy: the caller's text may not outlive the graph
  Work work;
  Addresses memory;  // device memory that the work uses
};

class Graph : public std::enable_shared_from_this<Graph> {
 public:
  Graph(std::shared_ptr<Stream> origin, aclmdlRICaptureMode mode);

  std::uint32_t id() const { return id_; }
  int device() const { return origin_->device(); }
  aclmdlRICaptureMode mode() const { return mode_; }
  bool is_of_this_thread() const { return thread_ == std::this_thread::get_id(); }

  // --- Capture ---

  // Adds work of a captured stream.
  int add(const std::shared_ptr<Stream>& stream, Recorded task, Place place);

  // Adds a record of an event, and a wait for such a record. The waiting stream joins the capture if it is not in it.
  std::size_t add_record(const std::shared_ptr<Stream>& stream);
  void add_wait(const std::shared_ptr<Stream>& stream, std::size_t record);

  // Makes the capture fail at its end, with the reason of the first call.
  void invalidate(const std::string& reason);
  bool is_invalidated();
  bool is_capturing();

  // Ends the capture on all its streams. Returns an error if the capture is invalid or lanes are not joined.
  int end(const std::shared_ptr<Stream>& stream);

  int begin_group(const std::shared_ptr<Stream>& stream);
  int end_group(const std::shared_ptr<Stream>& stream, struct TaskGroup*& group);

  // --- Replay ---

  // Runs all work as work of `stream`.
  int execute(const std::shared_ptr<Stream>& stream);

  // Replaces the work of a group's tasks.
  int replace(const std::vector<std::size_t>& nodes, const std::vector<Recorded>& tasks);

  std::vector<std::string> names_of(const std::vector<std::size_t>& nodes);

  // The graph as JSON: one entry for each node, with its lane and name.
  std::string as_json();

 private:
  enum class Kind { kWork, kRecord, kWait };

  struct Node {
    Kind kind;
    std::size_t lane;
    std::shared_ptr<const Recorded> task;  // kRecord and kWait: the name alone
    std::size_t record = 0;            // kWait: the node of the record
    LaneCounts before;                 // kRecord: all that the record waits for
  };

  struct Lane {
    std::shared_ptr<Stream> stream;
    LaneCounts seen;              // what the lane's next node waits for
    std::size_t nodes = 0;        // kWork nodes
    std::vector<std::size_t> group;
    bool in_group = false;
  };

  std::size_t lane_of(const std::shared_ptr<Stream>& stream);
  std::shared_ptr<const Recorded> task_of(std::size_t node);
  int run_in_capture_order();
  int run_lanes();
  int run_node(std::size_t node);
  void release_streams();

  const std::uint32_t id_;
  const std::shared_ptr<Stream> origin_;
  const aclmdlRICaptureMode mode_;
  const std::thread::id thread_ = std::this_thread::get_id();

  std::mutex mutex_;  // guards the members below
  std::vector<Lane> lanes_;
  std::vector<Node> nodes_;
  std::string invalid_;
  bool capturing_ = true;
  bool needs_thread_ = false;  // work of the graph waits for another process or for the host

  std::mutex executing_;  // a graph runs once at a time
};

// A group of tasks of a graph, whose work can be replaced.
struct TaskGroup {
  std::weak_ptr<Graph> graph;
  std::vector<std::size_t> nodes;
};

// The new tasks of a group, while a stream records them.
struct TaskUpdate {
  TaskGroup group;
  std::vector<Recorded> tasks;
};

// Returns an error if a capture forbids `function`, which acts on the whole device at once: a thread captures, or
// another one does in global mode, and this thread has not exchanged its mode for a relaxed one. The capture goes on.
int refuse_in_capture(const char* function);

}  // namespace vllm_npu::emulator
