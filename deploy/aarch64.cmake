# Cross-compiles for 64-bit Arm (Grace, Graviton). Debian and Ubuntu have the compiler as g++-aarch64-linux-gnu. From the top
# of the checkout, into a wheel for linux_aarch64:
#   CMAKE_TOOLCHAIN_FILE=$PWD/deploy/aarch64.cmake _PYTHON_HOST_PLATFORM=linux-aarch64 SPECTRAL_OPS_SKIP_CUDA_BUILD=1 \
#     pip wheel --no-build-isolation --no-deps .
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++ CACHE FILEPATH "")
