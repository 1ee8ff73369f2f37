#!/usr/bin/env bash
# Runs once in cibuildwheel's manylinux_2_28 container: with SPECTRAL_OPS_CUDA=13.0 installs that CUDA compiler, from
# CUDA_REPOSITORY: the address of NVIDIA's packages for RHEL 8, or of a mirror, under which x86_64/ and sbsa/ lie.
set -euo pipefail

version=${SPECTRAL_OPS_CUDA:-}
if [ -z "$version" ]; then
  echo "SPECTRAL_OPS_CUDA is not set: CPU kernels only"
  exit 0
fi
if [[ ! $version =~ ^[0-9]+\.[0-9]+$ ]]; then
  echo "SPECTRAL_OPS_CUDA: got $version, wanted a version such as 12.9 or 13.0" >&2
  exit 2
fi
case $(uname -m) in
  x86_64) platform=x86_64 ;;
  aarch64) platform=sbsa ;;
  *) echo "NVIDIA has no CUDA packages for $(uname -m); unset SPECTRAL_OPS_CUDA" >&2; exit 2 ;;
esac
repository=${CUDA_REPOSITORY:?is not set, wanted the address of the packages for RHEL 8 from NVIDIA}
dnf config-manager --add-repo "$repository/$platform/cuda-rhel8.repo"
dnf install -y "cuda-nvcc-${version/./-}" "cuda-cudart-devel-${version/./-}"
ln -sfn "/usr/local/cuda-$version" /usr/local/cuda
/usr/local/cuda/bin/nvcc --version
