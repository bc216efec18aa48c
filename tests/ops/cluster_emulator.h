// The functions of cluster_device.h on a CPU, so that the kernels' own source can be tested without a GPU. Every CUDA
// thread of a cluster is a fiber; a fiber runs until it must wait, and then a random one goes on. What is sent to another
// block arrives at once or only at the sender's next cluster barrier, as chance will have it. So a barrier that is
// missing shows in the results.
//
// Tensor core products follow the layouts of the PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"
// and "Matrix Fragments for mma.m16n8k8".

#include <bit>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#define DEVICE inline
#define KERNEL static void

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

namespace emulator {

constexpr int kWarpSize = 32, kStackBytes = 64 * 1024, kGuardBytes = 256;
enum Wait { kWarp = 1, kBlock = 2, kCluster = 4 };

struct Fiber {
  int block, thread;
  ucontext_t start;
  std::jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, arrived = false;
  int64_t cluster_phase = 0;
  std::vector<std::function<void()>> under_way;  // sent, but not there yet
};

// Threads that wait for each other.
struct Barrier {
  int expected = 0, arrived = 0;
  int64_t phase = 0;
  std::string kind;  // of what the first to come waits for
  std::vector<Fiber*> waiting;
};

struct Warp {
  Barrier barrier;
  struct Lane {
    Chunk a;
    unsigned b[2];
    float* sums;
  } lanes[kWarpSize];
};

struct Block {
  std::vector<char> memory;
  char* shared;
  std::vector<Warp> warps;
  Barrier barrier;
  bool started = false;
  int running = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  Fiber* current = nullptr;
  std::jmp_buf scheduler;
  std::mt19937 random;
  std::function<void()> kernel;
  std::string problem;
  int index = 0, ignored = 0;
};

inline Cluster* cluster;

inline Fiber& self() { return *cluster->current; }
inline Block& own_block() { return cluster->blocks[self().block]; }
inline Warp& own_warp() { return own_block().warps[self().thread / kWarpSize]; }

inline void fail(const std::string& problem) {
  if (cluster->problem.empty()) cluster->problem = problem;
  std::longjmp(cluster->scheduler, 1);
}

__attribute__((noinline)) inline void leave() {
  if (!setjmp(self().resume)) std::longjmp(cluster->scheduler, 1);
}

inline void release(Barrier& barrier) {
  barrier.arrived = 0, ++barrier.phase;
  for (Fiber* fiber : barrier.waiting) cluster->ready.push_back(fiber);
  barrier.waiting.clear();
}

// Wait until all have come; the last to come runs `last`.
template <typename F> inline void meet(Barrier& barrier, const char* kind, Wait wait, F last) {
  if (cluster->ignored & wait) return;
  if (barrier.arrived > 0 && barrier.kind != kind) fail("threads wait at " + barrier.kind + " and at " + kind);
  if (barrier.arrived == 0) barrier.kind = kind;
  if (++barrier.arrived == barrier.expected) {
    last();
    release(barrier);
  } else {
    barrier.waiting.push_back(&self());
    leave();
  }
}

inline void fiber_main() {
  cluster->kernel();
  if (!self().under_way.empty()) fail("a thread ends after sending to another block without a cluster barrier");
  if (--own_block().running == 0) own_block().started = false;
  std::longjmp(cluster->scheduler, 1);
}

// Run one cluster; `ignored` names barriers at which nobody waits. Returns what went wrong, or nothing.
inline std::string run(
    std::function<void()> kernel, int index, int blocks, int threads, int shared_bytes, unsigned seed, int ignored) {
  Cluster own;
  cluster = &own;
  own.kernel = kernel, own.index = index, own.ignored = ignored, own.random.seed(seed);
  own.blocks.resize(blocks);
  own.barrier.expected = blocks * threads;
  for (int rank = 0; rank < blocks; ++rank) {
    Block& block = own.blocks[rank];
    block.memory.assign(shared_bytes + 2 * kGuardBytes, char(0xff));  // not a number, in every type
    block.shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block.memory.data()) + 127) / 128 * 128);
    block.warps.resize(threads / kWarpSize);
    for (Warp& warp : block.warps) warp.barrier.expected = kWarpSize;
    block.barrier.expected = block.running = threads;
    for (int thread = 0; thread < threads; ++thread) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = rank, fiber->thread = thread;
      fiber->stack.reset(new char[kStackBytes]);
      getcontext(&fiber->start);
      fiber->start.uc_stack.ss_sp = fiber->stack.get();
      fiber->start.uc_stack.ss_size = kStackBytes;
      makecontext(&fiber->start, fiber_main, 0);
      own.ready.push_back(fiber.get());
      own.fibers.push_back(std::move(fiber));
    }
  }
  (void)setjmp(own.scheduler);
  if (cluster->problem.empty() && !cluster->ready.empty()) {
    auto& ready = cluster->ready;
    std::swap(ready[cluster->random() % ready.size()], ready.back());
    cluster->current = ready.back();
    ready.pop_back();
    if (self().started) std::longjmp(self().resume, 1);
    self().started = own_block().started = true;
    setcontext(&self().start);
  }
  if (cluster->problem.empty()) {
    for (const Block& block : cluster->blocks) {
      if (block.running) return "threads wait for others that never come";
      for (const char* at = block.shared + shared_bytes; at < block.memory.data() + block.memory.size(); ++at)
        if (*at != char(0xff)) return "something is written behind the shared memory";
    }
  }
  return cluster->problem;
}

inline float value(unsigned bits, Bf16) { return std::bit_cast<float>(bits << 16); }
inline float value(unsigned bits, Fp16) { return static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(bits))); }
inline float value(unsigned bits, float) { return std::bit_cast<float>(bits); }

template <typename T> inline T narrow(float number);
template <> inline Bf16 narrow(float number) {  // to nearest, ties to even
  const unsigned bits = std::bit_cast<unsigned>(number);
  if (std::isnan(number)) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <> inline Fp16 narrow(float number) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(number))}; }

// D (16 x 8) = A (16 x K) B (K x 8) + C for mma.m16n8k16 with 16-bit types, K = 16, and mma.m16n8k8 with TF32, K = 8.
template <typename T, int K> inline void matrix_product(Warp& warp) {
  double a[16][K], b[K][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    const Warp::Lane& own = warp.lanes[lane];
    if constexpr (K == 16) {
      for (int i = 0; i < 8; ++i) {  // a0 .. a7
        const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
        const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        a[row][column] = value(own.a.word[i / 2] >> (16 * (i & 1)) & 0xffff, T{});
      }
      for (int i = 0; i < 4; ++i) {  // b0 .. b3
        const int row = i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
        b[row][group] = value(own.b[i / 2] >> (16 * (i & 1)) & 0xffff, T{});
      }
    } else {
      for (int i = 0; i < 4; ++i) {
        if (own.a.word[i] & 0x1fff || own.b[i / 2] & 0x1fff) fail("an operand is not in TF32");
        a[i == 0 || i == 2 ? group : group + 8][i < 2 ? in_group : in_group + 4] = value(own.a.word[i], T{});
      }
      for (int i = 0; i < 2; ++i) b[i == 0 ? in_group : in_group + 4][group] = value(own.b[i], T{});
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
      double sum = warp.lanes[lane].sums[i];
      for (int k = 0; k < K; ++k) sum += a[row][k] * b[k][column];
      warp.lanes[lane].sums[i] = static_cast<float>(sum);
    }
}

template <typename T, int K> inline void product(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1) {
  Warp& warp = own_warp();
  warp.lanes[self().thread % kWarpSize] = {a, {b0, b1}, sums};
  // Nothing is spared this wait: without it there is no product.
  meet(warp.barrier, "a matrix product", Wait{}, [&] { matrix_product<T, K>(warp); });
}

template <typename T> inline void send(T* own, int rank, const T& value) {
  if (rank < 0 || rank >= int(cluster->blocks.size())) fail("something is sent to a block that there is not");
  Block& to = cluster->blocks[rank];
  T* const target = reinterpret_cast<T*>(to.shared + (reinterpret_cast<char*>(own) - own_block().shared));
  if (!to.started) fail("something is sent to a block that does not run");
  auto arrive = [target, value] { *target = value; };
  if (cluster->random() & 1) arrive();
  else self().under_way.push_back(arrive);
}

}  // namespace emulator

inline int thread_index() { return emulator::self().thread; }
inline int block_rank() { return emulator::self().block; }
inline int cluster_index() { return emulator::cluster->index; }
inline char* shared_memory() { return emulator::own_block().shared; }

inline void synchronize_warp() {
  emulator::meet(emulator::own_warp().barrier, "synchronize_warp", emulator::kWarp, [] {});
}
inline void synchronize_block() {
  emulator::meet(emulator::own_block().barrier, "synchronize_block", emulator::kBlock, [] {});
}
inline void arrive_at_cluster() {
  emulator::Fiber& fiber = emulator::self();
  if (fiber.arrived) emulator::fail("a thread arrives at the cluster barrier twice");
  for (auto& arrive : fiber.under_way) arrive();
  fiber.under_way.clear();
  emulator::Barrier& barrier = emulator::cluster->barrier;
  fiber.arrived = true, fiber.cluster_phase = barrier.phase;
  if (++barrier.arrived == barrier.expected) emulator::release(barrier);
}
inline void wait_for_cluster() {
  emulator::Fiber& fiber = emulator::self();
  if (!fiber.arrived) emulator::fail("a thread waits at the cluster barrier without having arrived");
  fiber.arrived = false;
  emulator::Barrier& barrier = emulator::cluster->barrier;
  if (barrier.phase != fiber.cluster_phase) return;
  if (emulator::cluster->ignored & emulator::kCluster) return;
  barrier.waiting.push_back(&fiber);
  emulator::leave();
}

inline void store_remote(Chunk* own, int rank, const Chunk& value) { emulator::send(own, rank, value); }
inline void store_remote(Pair* own, int rank, const Pair& value) { emulator::send(own, rank, value); }
inline void prefetch(const void*) {}

inline void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, Bf16) {
  emulator::product<Bf16, 16>(sums, a, b0, b1);
}
inline void multiply_add(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1, Fp16) {
  emulator::product<Fp16, 16>(sums, a, b0, b1);
}
inline void multiply_add_tf32(float (&sums)[4], const Chunk& a, unsigned b0, unsigned b1) {
  emulator::product<float, 8>(sums, a, b0, b1);
}
// To nearest, ties away from zero.
inline unsigned nearest_tf32(float number) {
  return std::isnan(number) ? 0x7fffe000 : (std::bit_cast<unsigned>(number) + 0x1000) & ~0x1fffu;
}

inline float from_bits(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned to_bits(float number) { return std::bit_cast<unsigned>(number); }
inline float to_float(float number) { return number; }
inline float to_float(Bf16 number) { return emulator::value(number.bits, number); }
inline float to_float(Fp16 number) { return emulator::value(number.bits, number); }
inline void convert(float number, float& result) { result = number; }
inline void convert(float number, Bf16& result) { result = emulator::narrow<Bf16>(number); }
inline void convert(float number, Fp16& result) { result = emulator::narrow<Fp16>(number); }
inline float approximate_exp2(float number) { return std::exp2(number); }
inline float approximate_log2(float number) { return std::log2(number); }
inline float approximate_reciprocal(float number) { return 1.0f / number; }
