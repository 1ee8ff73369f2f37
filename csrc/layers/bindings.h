// Every layer operator, once for all devices.
#pragma once

#include "bat.h"
#include "blocksum.h"
#include "csr.h"
#include "dora.h"
#include "group.h"
#include "lowrank.h"
#include "rosa.h"
#include "segments.h"

namespace spectral_ops {

template <class Device>
inline constexpr Binding kLayers[] = {
    {"bat_linear_forward", TORCH_BOX(&bat_linear_forward<Device>)},
    {"bat_linear_backward", TORCH_BOX(&bat_linear_backward<Device>)},
    {"bat_weight_forward", TORCH_BOX(&bat_weight_forward<Device>)},
    {"bat_weight_backward", TORCH_BOX(&bat_weight_backward<Device>)},
    {"bone_linear_forward", TORCH_BOX(&bone_linear_forward<Device>)},
    {"bone_linear_backward", TORCH_BOX(&bone_linear_backward<Device>)},
    {"bone_update_forward_", TORCH_BOX(&Mutating<&bone_update_forward_<Device>>::run)},
    {"dora_linear_forward", TORCH_BOX(&dora_linear_forward<Device>)},
    {"dora_linear_backward", TORCH_BOX(&dora_linear_backward<Device>)},
    {"dora_update_forward_", TORCH_BOX(&Mutating<&dora_update_forward_<Device>>::run)},
    {"lowrank_group_forward", TORCH_BOX(&lowrank_group_forward<Device>)},
    {"lowrank_group_backward", TORCH_BOX(&lowrank_group_backward<Device>)},
    {"lowrank_linear_forward", TORCH_BOX(&lowrank_linear_forward<Device>)},
    {"lowrank_linear_backward", TORCH_BOX(&lowrank_linear_backward<Device>)},
    {"lowrank_update_forward_", TORCH_BOX(&Mutating<&lowrank_update_forward_<Device>>::run)},
    {"segmented_linear_forward", TORCH_BOX(&segmented_linear_forward<Device>)},
    {"segmented_update_forward_", TORCH_BOX(&Mutating<&segmented_update_forward_<Device>>::run)},
    {"segmented_linear_backward", TORCH_BOX(&segmented_linear_backward<Device>)},
    {"rosa_linear_forward", TORCH_BOX(&rosa_linear_forward<Device>)},
    {"rosa_linear_backward", TORCH_BOX(&rosa_linear_backward<Device>)},
    {"csr_spmm_forward", TORCH_BOX(&csr_spmm_forward<Device>)},
    {"csr_spmm_backward", TORCH_BOX(&csr_spmm_backward<Device>)},
    {"csr_add_forward", TORCH_BOX(&csr_add_forward<Device>)},
    {"csr_add_backward", TORCH_BOX(&csr_add_backward<Device>)},
};

}  // namespace spectral_ops
