#include "decode_launch.h"

namespace prefix_kernels::cuda {

int launch_bfloat16(const DecodeCall& call, int head_dim, void* stream) { return launch<bfloat16>(call, head_dim, stream); }
int describe_bfloat16(int head_dim, KernelInfo* info) { return describe<bfloat16>(head_dim, info); }

}  // namespace prefix_kernels::cuda
