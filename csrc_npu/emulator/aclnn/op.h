// How an op becomes part of the aclnn C interface.
//
//   Plan swiglu(at::Tensor x, int64_t dim, at::Tensor y) {
//     require_one_of(dim, "dim", {-1});       // now: refuse arguments that are not supported
//     return [x, y] { y.copy_(...); };        // later, on the stream: compute
//   }
//   ACLNN_OP(aclnnSwiGlu, swiglu);
//
// These lines define two C functions. aclnnSwiGluGetWorkspaceSize(const aclTensor*, int64_t, const aclTensor*,
// uint64_t*, aclOpExecutor**) makes the plan. aclnnSwiGlu(void*, uint64_t, aclOpExecutor*, aclrtStream) runs it.
// Argument, below, gives the C parameter for each parameter of `swiglu`. A parameter may be a struct with a type
// `Fields`, a tuple of its members' types. It takes one C parameter for each member, in order. A plan captures tensors,
// never handles, because handles are destroyed before the plan runs.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "handles.h"
#include "refusal.h"
#include "runtime/runtime.h"

struct aclOpExecutor;

namespace vllm_npu::emulator::aclnn {

using OptionalTensor = std::optional<at::Tensor>;

// An op's work. It throws Refusal if the tensors hold a value that the op does not support.
using Plan = std::function<void()>;

// Call it in ops whose document does not list Ascend310P.
inline void refuse_on_310p(const char* op) {
  require(current_soc().family != Family::k310P, current_soc().name, " has no ", op);
}

// Notes that the op in preparation uses the tensor's memory.
void note_memory(const at::Tensor& tensor);

// How one parameter crosses the C interface. `Handle` is the C type, and `take` converts it to the parameter.
template <class Parameter>
struct Argument {  // numbers are not converted
  using Handle = Parameter;
  static Parameter take(Handle value) { return value; }
};

template <>
struct Argument<OptionalTensor> {
  using Handle = const aclTensor*;
  static OptionalTensor take(Handle handle) {
    if (handle == nullptr) return std::nullopt;
    if (!handle->fault.empty()) refuse(Code::kInvalid, "an argument ", handle->fault);
    note_memory(handle->tensor);
    return handle->tensor;
  }
};

template <>
struct Argument<at::Tensor> {
  using Handle = const aclTensor*;
  static at::Tensor take(Handle handle) {
    auto tensor = Argument<OptionalTensor>::take(handle);
    if (!tensor) refuse(Code::kMissing, "a tensor that the op needs is missing");
    return *tensor;
  }
};

template <>
struct Argument<std::vector<at::Tensor>> {
  using Handle = const aclTensorList*;
  static std::vector<at::Tensor> take(Handle handle) {
    std::vector<at::Tensor> tensors;
    if (handle == nullptr) return tensors;
    for (const aclTensor* tensor : handle->tensors) tensors.push_back(Argument<at::Tensor>::take(tensor));
    return tensors;
  }
};

template <>
struct Argument<at::Scalar> {
  using Handle = const aclScalar*;
  static at::Scalar take(Handle handle) {
    if (handle == nullptr) refuse(Code::kMissing, "a scalar that the op needs is missing");
    return handle->value;
  }
};

template <>
struct Argument<std::vector<int64_t>> {
  using Handle = const aclIntArray*;
  static std::vector<int64_t> take(Handle handle) { return handle ? handle->values : std::vector<int64_t>(); }
};

template <>
struct Argument<std::string> {
  using Handle = const char*;
  static std::string take(Handle text) { return text ? text : ""; }
};

// The two steps of every op. They are defined in op.cpp.
int prepare(const char* name, const std::function<Plan()>& make_plan, uint64_t* workspace_size,
            aclOpExecutor** executor);
int run(const char* name, aclOpExecutor* executor, aclrtStream stream);

// As prepare(), for an op that is not run: the arguments are checked, and there is no executor.
int check_only(const char* name, const std::function<Plan()>& make_plan, uint64_t* workspace_size,
               aclOpExecutor** executor);

// The C parameters of one parameter of a plan.
template <class Parameter, class = void>
struct Parts {
  using Types = std::tuple<Parameter>;
};

template <class Struct>
struct Parts<Struct, std::void_t<typename Struct::Fields>> {
  using Types = typename Struct::Fields;
};

template <class Parameter>
using PartsOf = typename Parts<Parameter>::Types;

// Returns the index of the first C parameter of the plan's parameter `index`.
template <size_t index, class... Parameters>
constexpr size_t first_part() {
  constexpr size_t counts[] = {std::tuple_size_v<PartsOf<Parameters>>...};
  size_t first = 0;
  for (size_t i = 0; i < index; ++i) first += counts[i];
  return first;
}

template <class Parameter, size_t first, class Handles, size_t... part>
Parameter take_parameter(const Handles& handles, std::index_sequence<part...>) {
  return Parameter{Argument<std::tuple_element_t<part, PartsOf<Parameter>>>::take(std::get<first + part>(handles))...};
}

template <class... Parameters, class Handles, size_t... index>
Plan make_plan(Plan (*plan)(Parameters...), const Handles& handles, std::index_sequence<index...>) {
  return plan(take_parameter<Parameters, first_part<index, Parameters...>()>(
      handles, std::make_index_sequence<std::tuple_size_v<PartsOf<Parameters>>>())...);
}

template <class Name, auto plan, class CParameters>
struct EntryOf;

template <class Name, class... Parameters, Plan (*plan)(Parameters...), class... CParameters>
struct EntryOf<Name, plan, std::tuple<CParameters...>> {
  static int get_workspace_size(typename Argument<CParameters>::Handle... handles, uint64_t* workspace_size,
                                aclOpExecutor** executor) {
    const std::tuple<typename Argument<CParameters>::Handle...> all(handles...);
    return prepare(
        Name::text, [&] { return make_plan(plan, all, std::index_sequence_for<Parameters...>()); }, workspace_size,
        executor);
  }

  static int get_max_workspace_size(typename Argument<CParameters>::Handle... handles, uint64_t* workspace_size,
                                    aclOpExecutor** executor) {
    const std::tuple<typename Argument<CParameters>::Handle...> all(handles...);
    return check_only(
        Name::text, [&] { return make_plan(plan, all, std::index_sequence_for<Parameters...>()); }, workspace_size,
        executor);
  }

  static int execute(void* /*workspace*/, uint64_t /*workspace_size*/, aclOpExecutor* executor, aclrtStream stream) {
    return run(Name::text, executor, stream);
  }
};

template <class Name, auto plan>
struct Entry;

template <class Name, class... Parameters, Plan (*plan)(Parameters...)>
struct Entry<Name, plan> : EntryOf<Name, plan, decltype(std::tuple_cat(std::declval<PartsOf<Parameters>>()...))> {};

// An exported C function cannot be a template. So each exported name is an indirect function. The dynamic linker calls
// the function's resolver, which returns the address of the template's instance.
using CFunction = int (*)();

template <class Function>
CFunction as_c_function(Function* function) {
  return reinterpret_cast<CFunction>(reinterpret_cast<void*>(function));
}

#define ACLNN_OP(name, plan)                                                                             \
  struct name##Name {                                                                                    \
    static constexpr const char* text = #name;                                                           \
  };                                                                                                     \
  extern "C" {                                                                                           \
  static CFunction resolve_##name##GetWorkspaceSize() {                                                  \
    return as_c_function(&Entry<name##Name, &plan>::get_workspace_size);                                 \
  }                                                                                                      \
  static CFunction resolve_##name() { return as_c_function(&Entry<name##Name, &plan>::execute); }        \
  EMULATOR_API int name##GetWorkspaceSize() __attribute__((ifunc("resolve_" #name "GetWorkspaceSize"))); \
  EMULATOR_API int name() __attribute__((ifunc("resolve_" #name)));                                      \
  }                                                                                                      \
  static_assert(true, "a semicolon follows")

// A third C function of an op: the workspace for the longest sequences, which a captured graph keeps for its updates.
#define ACLNN_MAX_WORKSPACE(name, plan)                                                                        \
  extern "C" {                                                                                                 \
  static CFunction resolve_##name##GetMaxWorkspaceSize() {                                                     \
    return as_c_function(&Entry<name##Name, &plan>::get_max_workspace_size);                                   \
  }                                                                                                            \
  EMULATOR_API int name##GetMaxWorkspaceSize() __attribute__((ifunc("resolve_" #name "GetMaxWorkspaceSize"))); \
  }                                                                                                            \
  static_assert(true, "a semicolon follows")

}  // namespace vllm_npu::emulator::aclnn
