// The op as torch sees it, on torch's stable ABI (LibTorch 2.10 and later, any Python). The only file with torch headers.
//
// It checks everything the launch relies on, in a few comparisons, and refuses with a RuntimeError. Which argument is wrong and how is
// for mlpdown/validate.py to say, which looks at the arguments of a refused call.
#include <launcher.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <dlfcn.h>

#include <cstdint>
#include <optional>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr size_t kErrorSize = 512;
constexpr uintptr_t kAlignment = 16;  // of what bulk copies read

// What every tensor of a call shares with the weight. The dtype is torch's own code, which two tensors can be compared by: scalar_type()
// looks it up in a table of all dtypes.
struct Kind {
  int32_t device_index;
  int32_t dtype;
};

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype = 0;
  STD_TORCH_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype) == 0, "torch does not say which dtype a tensor has");
  return dtype;
}

Kind check_weight(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_cuda(), "weight must be on a CUDA device");
  const Kind kind = {weight.get_device_index(), dtype_of(weight)};
  STD_TORCH_CHECK(kind.dtype == aoti_torch_dtype_float16() || kind.dtype == aoti_torch_dtype_bfloat16(),
                  "weight must be float16 or bfloat16");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "weight must be a contiguous matrix");
  return kind;
}

void check_tensor(const Tensor& tensor, const char* name, const Kind& kind, int64_t numel) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == kind.device_index, name, " must be on the CUDA device of weight");
  STD_TORCH_CHECK(dtype_of(tensor) == kind.dtype, name, " must have the dtype of weight");
  STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
}

void check_same_shape(const Tensor& tensor, const char* name, const Tensor& hidden_states) {
  bool same = tensor.dim() == hidden_states.dim();
  for (int64_t axis = 0; same && axis < tensor.dim(); ++axis) same = tensor.size(axis) == hidden_states.size(axis);
  STD_TORCH_CHECK(same, name, " must have the shape of hidden_states");
}

void check_last_dim(const Tensor& tensor, const char* name, int64_t size) {
  STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.size(tensor.dim() - 1) == size, name, " must have a last dimension of ", size);
}

// One, or none, of which there is nothing to launch. More are refused by the check of mlp_intermediate.
int64_t count_tokens(const Tensor& mlp_intermediate) { return mlp_intermediate.numel() == 0 ? 0 : 1; }

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % kAlignment == 0; }

// The weight and the activation: what bulk copies read.
MlpDownProblem check_product(const Tensor& mlp_intermediate, const Tensor& weight, const Kind& kind, int64_t num_tokens) {
  const int64_t hidden_dim = weight.size(0);
  const int64_t intermediate_dim = weight.size(1);
  STD_TORCH_CHECK(hidden_dim >= 1 && hidden_dim < (int64_t{1} << 31), "hidden_dim must be in [1, 2**31), got ", hidden_dim);
  STD_TORCH_CHECK(intermediate_dim >= 8 && intermediate_dim % 8 == 0 && intermediate_dim < (int64_t{1} << 24),
                  "intermediate_dim must be a positive multiple of 8 below 2**24, got ", intermediate_dim);
  check_tensor(mlp_intermediate, "mlp_intermediate", kind, num_tokens * intermediate_dim);
  check_last_dim(mlp_intermediate, "mlp_intermediate", intermediate_dim);

  MlpDownProblem problem = {};
  problem.mlp_intermediate = mlp_intermediate.data_ptr();
  problem.weight = weight.data_ptr();
  STD_TORCH_CHECK(is_aligned(problem.weight) && is_aligned(problem.mlp_intermediate), "weight and mlp_intermediate must be 16-byte aligned");
  problem.hidden_dim = static_cast<unsigned int>(hidden_dim);
  problem.intermediate_dim = static_cast<unsigned int>(intermediate_dim);
  problem.is_bfloat16 = kind.dtype == aoti_torch_dtype_bfloat16();
  return problem;
}

// Everything but `out`.
MlpDownProblem check_inputs(const Tensor& hidden_states, const OptionalTensor& attn_output, const Tensor& mlp_intermediate,
                            const Tensor& weight, const OptionalTensor& bias, const Kind& kind, int64_t num_tokens) {
  MlpDownProblem problem = check_product(mlp_intermediate, weight, kind, num_tokens);
  const int64_t hidden_dim = problem.hidden_dim;
  check_tensor(hidden_states, "hidden_states", kind, num_tokens * hidden_dim);
  check_last_dim(hidden_states, "hidden_states", hidden_dim);
  problem.hidden_states = hidden_states.data_ptr();
  if (attn_output) {
    check_tensor(*attn_output, "attn_output", kind, num_tokens * hidden_dim);
    check_same_shape(*attn_output, "attn_output", hidden_states);
    problem.attn_output = attn_output->data_ptr();
  }
  if (bias) {
    check_tensor(*bias, "bias", kind, hidden_dim);
    STD_TORCH_CHECK(bias->dim() == 1, "bias must have one dimension");
    problem.bias = bias->data_ptr();
  }
  return problem;
}

// As torch::stable::empty_like, which looks aten::empty_like up by its name and boxes its arguments.
Tensor empty_like(const Tensor& tensor, const Kind& kind) {
  AtenTensorHandle result = nullptr;
  STD_TORCH_CHECK(aoti_torch_empty_strided(tensor.dim(), tensor.sizes().data(), tensor.strides().data(), kind.dtype,
                                           aoti_torch_device_type_cuda(), kind.device_index, &result) == 0,
                  "torch could not allocate the result");
  return Tensor(result);
}

bool overlap(const Tensor& out, const Tensor& tensor) {
  const char* const out_begin = static_cast<const char*>(out.data_ptr());
  const char* const begin = static_cast<const char*>(tensor.data_ptr());
  return out_begin < begin + tensor.numel() * tensor.element_size() && begin < out_begin + out.numel() * out.element_size();
}

// The plan comes as one number (plan.h), since torch takes as long over a number as over a tensor.
MlpDownPlan unpack_plan(int64_t packed) {
  STD_TORCH_CHECK(packed >= 0, "plan must not be negative, got ", packed);
  MlpDownPlan plan;
  uint64_t rest = static_cast<uint64_t>(packed);
#define MLPDOWN_UNPACK(name, bits)     \
  plan.name = rest & ((1u << (bits)) - 1); \
  rest >>= (bits);
  MLPDOWN_PLAN_MEMBERS(MLPDOWN_UNPACK)
#undef MLPDOWN_UNPACK
  STD_TORCH_CHECK(rest == 0, "plan has bits beyond its members, got ", packed);
  return plan;
}

// torch's own function, out of its CUDA library. Looked up, not linked: a CPU-only torch has no such library, and this one loads there too.
using GetCurrentStream = decltype(&aoti_torch_get_current_cuda_stream);

GetCurrentStream find_get_current_stream() {
  void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(torch_cuda != nullptr, "this torch was built without CUDA");
  const auto function = reinterpret_cast<GetCurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(function != nullptr, "this torch is too old: it does not say which CUDA stream is current");
  return function;
}

// On the current stream of the tensors' device, whatever the caller's current device is.
void launch(const MlpDownProblem& problem, const MlpDownPlan& plan, int32_t device_index) {
  static const GetCurrentStream get_current_stream = find_get_current_stream();
  const torch::stable::accelerator::DeviceGuard guard(device_index);
  void* stream = nullptr;
  STD_TORCH_CHECK(get_current_stream(device_index, &stream) == 0, "torch has no current stream for device ", device_index);
  char error[kErrorSize] = "";
  STD_TORCH_CHECK(mlpdown_launch(&problem, &plan, stream, error, kErrorSize) == 0, error);
}

Tensor run_cuda(const Tensor& hidden_states, const OptionalTensor& attn_output, const Tensor& mlp_intermediate, const Tensor& weight,
                     const OptionalTensor& bias, int64_t plan) {
  const Kind kind = check_weight(weight);
  const int64_t num_tokens = count_tokens(mlp_intermediate);
  MlpDownProblem problem = check_inputs(hidden_states, attn_output, mlp_intermediate, weight, bias, kind, num_tokens);
  const Tensor out = empty_like(hidden_states, kind);
  problem.out = out.data_ptr();
  if (num_tokens > 0) launch(problem, unpack_plan(plan), kind.device_index);
  return out;
}

void run_out_cuda(const Tensor& hidden_states, const OptionalTensor& attn_output, const Tensor& mlp_intermediate, const Tensor& weight,
                       const OptionalTensor& bias, int64_t plan, const Tensor& out) {
  const Kind kind = check_weight(weight);
  const int64_t num_tokens = count_tokens(mlp_intermediate);
  MlpDownProblem problem = check_inputs(hidden_states, attn_output, mlp_intermediate, weight, bias, kind, num_tokens);
  check_tensor(out, "out", kind, num_tokens * problem.hidden_dim);
  check_same_shape(out, "out", hidden_states);
  STD_TORCH_CHECK(!overlap(out, hidden_states) && !(attn_output && overlap(out, *attn_output)) && !overlap(out, mlp_intermediate) &&
                      !overlap(out, weight) && !(bias && overlap(out, *bias)),
                  "out must not overlap an input");
  problem.out = out.data_ptr();
  if (num_tokens > 0) launch(problem, unpack_plan(plan), kind.device_index);
}

Tensor row_sums_cuda(const Tensor& mlp_intermediate, const Tensor& weight, int64_t plan) {
  const Kind kind = check_weight(weight);
  MlpDownProblem problem = check_product(mlp_intermediate, weight, kind, 1);
  const int64_t size[] = {problem.hidden_dim};
  const Tensor out = torch::stable::new_empty(mlp_intermediate, torch::headeronly::IntHeaderOnlyArrayRef(size, 1), ScalarType::Float);
  problem.out = out.data_ptr();
  problem.is_partial_sums = 1;
  launch(problem, unpack_plan(plan), kind.device_index);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(mlpdown, library) {
  library.def(
      "run(Tensor hidden_states, Tensor? attn_output, Tensor mlp_intermediate, Tensor weight, Tensor? bias, int plan) -> Tensor");
  library.def(
      "run.out(Tensor hidden_states, Tensor? attn_output, Tensor mlp_intermediate, Tensor weight, Tensor? bias, int plan, *, "
      "Tensor(a!) out) -> ()");
  library.def("row_sums(Tensor mlp_intermediate, Tensor weight, int plan) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mlpdown, CUDA, library) {
  library.impl("run", TORCH_BOX(&run_cuda));
  library.impl("run.out", TORCH_BOX(&run_out_cuda));
  library.impl("row_sums", TORCH_BOX(&row_sums_cuda));
}

// On CPU tensors the same functions answer that the weight must be on a CUDA device.
STABLE_TORCH_LIBRARY_IMPL(mlpdown, CPU, library) {
  library.impl("run", TORCH_BOX(&run_cuda));
  library.impl("run.out", TORCH_BOX(&run_out_cuda));
  library.impl("row_sums", TORCH_BOX(&row_sums_cuda));
}
