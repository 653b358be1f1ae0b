#include "decode_launch.h"

namespace prefix_kernels::cuda {

int launch_float16(const DecodeCall& call, int head_dim, void* stream) { return launch<float16>(call, head_dim, stream); }
int describe_float16(int head_dim, KernelInfo* info) { return describe<float16>(head_dim, info); }

}  // namespace prefix_kernels::cuda
