// What a newer compiler takes from a newer glibc or libstdc++ than the wheel's tag promises (manylinux_2_28), in place of
// theirs; the linker keeps it to this library. The stubs in CMakeLists.txt do the same for the functions of glibc. All of it
// is weak: a libstdc++ that is linked statically, in part with RHEL's newer compilers, has the same.
#include <new>
#include <sstream>

namespace std {

[[noreturn]] __attribute__((weak)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }  // GLIBCXX_3.4.29

template basic_ostringstream<char>::basic_ostringstream();  // GLIBCXX_3.4.26
template basic_stringstream<char>::basic_stringstream();    // the same

}  // namespace std

extern "C" { __attribute__((weak)) char __libc_single_threaded = 0; }  // GLIBC_2.32: whether shared_ptr may count without atomics; it may not
