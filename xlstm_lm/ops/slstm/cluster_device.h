// What the cluster kernels ask of the GPU, by instructions of sm_90 and newer. There are no CUDA headers where they are
// compiled (NVRTC). tests/ops/cluster_emulator.h gives the same functions on a CPU.

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(32 * WARPS, 1)

struct alignas(16) Chunk {
  unsigned word[4];
};
struct alignas(8) Pair {
  float value[2];
};
struct Bf16 {
  unsigned short bits;
};
struct Fp16 {
  unsigned short bits;
};

DEVICE int thread_index() { return threadIdx.x; }

DEVICE int block_rank() {  // in its cluster
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

DEVICE int cluster_index() {
  int index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char dynamic_shared_memory[];
  return dynamic_shared_memory;
}

DEVICE void synchronize_warp() { __syncwarp(); }
DEVICE void synchronize_block() { __syncthreads(); }

// What was stored before, in whichever block, is seen by all threads of the cluster after `wait_for_cluster`.
// Both want the threads of a warp together.
DEVICE void arrive_at_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
DEVICE void wait_for_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE unsigned remote_address(const void* own, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
  return address;
}

// Store where `own` is in the shared memory of another block of the cluster.
DEVICE void store_remote(Chunk* own, int rank, const Chunk& value) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(remote_address(own, rank)),
               "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

DEVICE void store_remote(Pair* own, int rank, const Pair& value) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(remote_address(own, rank)), "f"(value.value[0]),
               "f"(value.value[1])
               : "memory");
}

DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// sums (16 x 8) += a (16 x 16) b (16 x 8), spread over the warp.
DEVICE void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

DEVICE void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, Fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

// The same with a (16 x 8) b (8 x 8) in TF32.
DEVICE void multiply_add_tf32(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

DEVICE unsigned nearest_tf32(float value) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}

DEVICE float from_bits(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned to_bits(float value) { return __float_as_uint(value); }

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(Bf16 value) { return from_bits(static_cast<unsigned>(value.bits) << 16); }
DEVICE float to_float(Fp16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

DEVICE void convert(float value, float& result) { result = value; }
DEVICE void convert(float value, Bf16& result) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value)); }
DEVICE void convert(float value, Fp16& result) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value)); }

// To about 2^-22, of the value or, for the logarithm, absolutely.
DEVICE float approximate_exp2(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
DEVICE float approximate_log2(float value) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
DEVICE float approximate_reciprocal(float value) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}
