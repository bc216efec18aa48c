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

// All threads of the cluster wait for each other; what they stored before in their shared memory is seen after it.
DEVICE void synchronize_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

DEVICE unsigned shared_address(const void* own) { return static_cast<unsigned>(__cvta_generic_to_shared(own)); }

DEVICE unsigned remote_address(const void* own, int rank) {
  unsigned address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}

// A barrier in the shared memory of a block. Its phases, of parity 0, 1, 0 .. , end one after the other, each when as
// many threads of the block as agreed on have arrived and all the bytes that they expected have come from the cluster.
struct alignas(8) Mailbox {
  unsigned long long state;
};

DEVICE void open_mailbox(Mailbox* box, int arrivals) {  // to be followed by synchronize_cluster
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\nfence.mbarrier_init.release.cluster;" ::"r"(
                   shared_address(box)), "r"(arrivals)
               : "memory");
}

DEVICE void arrive(Mailbox* box) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(box)) : "memory");
}

DEVICE void arrive_expecting(Mailbox* box, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)), "r"(bytes)
               : "memory");
}

// Until the phase of this parity has ended: then all that was sent and stored for it is seen.
DEVICE void wait_for_mail(Mailbox* box, int parity) {
  unsigned ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(shared_address(box)), "r"(parity)
        : "memory");
  } while (!ended);
  __syncwarp();
}

// Store where `own` is in the shared memory of another block of the cluster, and count the bytes in its mailbox.
DEVICE void send(Chunk* own, int rank, const Chunk& value, Mailbox* box) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   remote_address(own, rank)), "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]),
               "r"(value.word[3]), "r"(remote_address(box, rank))
               : "memory");
}

DEVICE void send(Pair* own, int rank, const Pair& value, Mailbox* box) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   remote_address(own, rank)), "f"(value.value[0]), "f"(value.value[1]), "r"(remote_address(box, rank))
               : "memory");
}

DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// sums (16 x 8) += a (16 x 16) b (16 x 8), spread over the warp.
DEVICE void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, Bf16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

DEVICE void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, Fp16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b0), "r"(b1));
}

// The same with a (16 x 8) b (8 x 8) in TF32.
DEVICE void multiply_add_tf32(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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
