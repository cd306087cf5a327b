namespace matgptq {
struct Kernels;
const Kernels* neon_kernels();
const Kernels* neon_kernels() { return nullptr; }
}  // namespace matgptq
