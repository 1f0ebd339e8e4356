// Traces, and the error texts behind aclGetRecentErrMsg.
#include <cstdarg>
#include <cstdio>
#include <mutex>
#include <string>

#include "runtime.h"
#include "settings.h"

namespace vllm_npu::emulator {
namespace {

constexpr std::size_t kMaxTextBytes = 4096;

thread_local std::string recent_text;
thread_local std::string returned_text;  // what aclGetRecentErrMsg returned last; valid until its next call

// torch_npu's queue thread makes calls, and the main thread reports their errors. So a thread without an error text of
// its own gets the text that any thread recorded last.
std::mutex& process_text_mutex() {
  static auto* mutex = new std::mutex;
  return *mutex;
}

std::string& process_text() {
  static auto* text = new std::string;
  return *text;
}

std::string format_text(const char* format, va_list arguments) {
  char text[kMaxTextBytes];
  std::vsnprintf(text, sizeof text, format, arguments);
  return text;
}

const std::string& rank_label() {
  static const auto* label = new std::string("npu[" + environment("RANK", "0") + "] ");
  return *label;
}

void print_line(const char* name, const std::string& details) {
  std::string line = rank_label() + name;
  if (!details.empty()) line += " " + details;
  line += "\n";
  std::fwrite(line.data(), 1, line.size(), stderr);
}

}  // namespace

bool tracing() {
  static const bool on = environment("VLLM_NPU_EMULATOR_TRACE", "0") != "0";
  return on;
}

void trace(const char* name) {
  if (tracing()) print_line(name, "");
}

void trace(const char* name, const char* format, ...) {
  if (!tracing()) return;
  va_list arguments;
  va_start(arguments, format);
  print_line(name, format_text(format, arguments));
  va_end(arguments);
}

int fail(int code, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  recent_text = format_text(format, arguments);
  va_end(arguments);
  const std::lock_guard<std::mutex> lock(process_text_mutex());
  process_text() = recent_text;
  return code;
}

const char* last_error_text() { return recent_text.c_str(); }

}  // namespace vllm_npu::emulator

using namespace vllm_npu::emulator;

const char* aclGetRecentErrMsg() {
  const std::lock_guard<std::mutex> lock(process_text_mutex());
  returned_text = recent_text.empty() ? process_text() : recent_text;
  recent_text.clear();
  process_text().clear();
  return returned_text.c_str();
}

void aclAppLog(aclLogLevel level, const char* function, const char* file, uint32_t line, const char* format, ...) {
  const std::optional<std::uint64_t> least = least_log_level();
  if (!least || static_cast<std::uint64_t>(level) < *least) return;
  va_list arguments;
  va_start(arguments, format);
  const std::string text = format_text(format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "%s%s:%u %s: %s\n", rank_label().c_str(), file, line, function, text.c_str());
}
