// What autograd asks of a CUDA device before it takes a tensor that says that it lies on one: one device, one stream, events that have
// always happened. fake_cuda.py loads it before torch, so that its getAccelerator() is found before torch's own.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

static const c10::Device DEVICE(c10::DeviceType::CUDA, 0);
static const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);

namespace at::accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) { return DEVICE.type(); }
__attribute__((visibility("default"))) c10::Stream getCurrentStream(c10::DeviceIndex) { return STREAM; }
}  // namespace at::accelerator

namespace c10::impl {
struct FakeGuard final : NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  Stream getStream(Device) const noexcept override { return STREAM; }
  Stream getDefaultStream(Device) const override { return STREAM; }
  Stream exchangeStream(Stream) const noexcept override { return STREAM; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, FakeGuard)
}  // namespace c10::impl

namespace at {
struct CUDAHooks final : CUDAHooksInterface {  // they are looked for by this name
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at
