// What a torch without CUDA lacks to believe in two GPUs: who knows the current one, and that there are any. Nothing computes here;
// pretended_gpus.py has the tensors. Loaded before torch is imported.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <utility>

namespace {

constexpr c10::DeviceIndex kGpus = 2;
thread_local c10::DeviceIndex current = 0;

c10::Device gpu(c10::DeviceIndex index) { return {c10::DeviceType::CUDA, index < 0 ? current : index}; }
c10::Stream stream(c10::Device device) { return c10::Stream(c10::Stream::DEFAULT, gpu(device.index())); }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return kGpus; }
  c10::Device getDevice() const override { return gpu(current); }
  c10::Device exchangeDevice(c10::Device to) const override { return gpu(std::exchange(current, gpu(to.index()).index())); }
  void setDevice(c10::Device to) const override { current = gpu(to.index()).index(); }
  void uncheckedSetDevice(c10::Device to) const noexcept override { current = gpu(to.index()).index(); }
  c10::Stream getStream(c10::Device of) const override { return stream(of); }
  c10::Stream getDefaultStream(c10::Device of) const override { return stream(of); }
  c10::Stream exchangeStream(c10::Stream to) const override { return to; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

}  // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace at {

struct CUDAHooks final : CUDAHooksInterface {  // torch looks for this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  DeviceIndex deviceCount() const override { return kGpus; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
};

REGISTER_CUDA_HOOKS(CUDAHooks)

}  // namespace at
