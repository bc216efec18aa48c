// The functions of cluster_device.h on a CPU, so that the kernels' own source can be tested without a GPU. Every CUDA
// thread of a cluster is a fiber; a fiber runs until it must wait, and then a random one goes on, or something that was
// sent arrives. So a barrier that is missing shows in the results.
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
struct alignas(8) Mailbox {
  unsigned long long state;
};
struct Bf16 {
  unsigned short bits;
};
struct Fp16 {
  unsigned short bits;
};

namespace emulator {

constexpr int kWarpSize = 32, kStackBytes = 64 * 1024, kGuardBytes = 256;
enum Wait { kWarp = 1, kBlock = 2, kCluster = 4, kMail = 8 };

struct Fiber {
  int block, thread;
  ucontext_t start;
  std::jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false;
};

// Threads that wait for each other.
struct Barrier {
  int expected = 0, arrived = 0;
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

struct Box {
  Barrier arrivals;
  int64_t bytes = 0, phases_ended = 0;
};

struct Block {
  std::vector<char> memory;
  char* shared;
  std::vector<Warp> warps;
  std::vector<Box> boxes;
  Barrier barrier;
  bool started = false;
  int running = 0;
};

struct Cluster {
  std::vector<Block> blocks;
  Barrier barrier;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Fiber*> ready;
  std::vector<std::function<void()>> under_way;  // sent, but not there yet
  Fiber* current = nullptr;
  std::jmp_buf scheduler;
  std::mt19937 random;
  unsigned slow_block = 0, slow_warp = 0;
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
  barrier.arrived = 0;
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
  if (--own_block().running == 0) own_block().started = false;
  std::longjmp(cluster->scheduler, 1);
}

// Run one cluster; `ignored` names barriers at which nobody waits. Returns what went wrong, or nothing.
inline std::string run(
    std::function<void()> kernel, int index, int blocks, int threads, int shared_bytes, unsigned seed, int ignored) {
  Cluster own;
  cluster = &own;
  own.kernel = kernel, own.index = index, own.ignored = ignored, own.random.seed(seed);
  own.slow_block = own.random(), own.slow_warp = own.random();
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
  while (cluster->problem.empty() && cluster->under_way.size() > cluster->random() % (cluster->ready.size() + 1)) {
    auto& under_way = cluster->under_way;
    std::swap(under_way[cluster->random() % under_way.size()], under_way.back());
    const auto arrival = std::move(under_way.back());
    under_way.pop_back();
    arrival();
  }
  if (cluster->problem.empty() && !cluster->ready.empty()) {
    // For a while, perhaps, one block or one warp of each block goes on only when nobody else does.
    if (cluster->random() % 16384 == 0) cluster->slow_block = cluster->random(), cluster->slow_warp = cluster->random();
    auto& ready = cluster->ready;
    for (int attempt = 0; attempt < 16; ++attempt) {
      std::swap(ready[cluster->random() % ready.size()], ready.back());
      cluster->current = ready.back();
      const bool slow_block = self().block == int(cluster->slow_block % (2 * blocks));
      const bool slow_warp = self().thread / kWarpSize == int(cluster->slow_warp % (2 * threads / kWarpSize));
      if (!slow_block && !slow_warp) break;
    }
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
inline float value(unsigned bits, Fp16) { return std::bit_cast<_Float16>(static_cast<uint16_t>(bits)); }
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

inline Box& box_of(int block, const Mailbox* own) {
  if (own->state >= cluster->blocks[block].boxes.size()) fail("a mailbox is used before it is opened");
  return cluster->blocks[block].boxes[own->state];
}

inline void end_phase_if_complete(Box& box) {
  if (box.arrivals.arrived < box.arrivals.expected || box.bytes != 0) return;
  ++box.phases_ended;
  release(box.arrivals);
}

inline void come(Mailbox* own, int bytes) {
  Box& box = box_of(self().block, own);
  box.bytes += bytes;
  if (++box.arrivals.arrived > box.arrivals.expected) fail("a mailbox has more arrivals than it was opened for");
  end_phase_if_complete(box);
}

template <typename T> inline void send(T* own, int rank, const T& value, const Mailbox* own_box) {
  if (rank < 0 || rank >= int(cluster->blocks.size())) fail("something is sent to a block that there is not");
  const int64_t offset = reinterpret_cast<char*>(own) - own_block().shared;
  const int64_t box_offset = reinterpret_cast<const char*>(own_box) - own_block().shared;
  cluster->under_way.push_back([=] {
    Block& to = cluster->blocks[rank];
    const auto index = reinterpret_cast<Mailbox*>(to.shared + box_offset)->state;
    if (!to.started || index >= to.boxes.size()) {
      cluster->problem = "something is sent to a block that does not run or has no mailbox yet";
      return;
    }
    *reinterpret_cast<T*>(to.shared + offset) = value;
    Box& box = to.boxes[index];
    box.bytes -= sizeof(T);
    end_phase_if_complete(box);
  });
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
inline void synchronize_cluster() {
  emulator::meet(emulator::cluster->barrier, "synchronize_cluster", emulator::kCluster, [] {});
}

inline void open_mailbox(Mailbox* box, int arrivals) {
  auto& boxes = emulator::own_block().boxes;
  box->state = boxes.size();
  boxes.emplace_back();
  boxes.back().arrivals.expected = arrivals;
}
inline void arrive(Mailbox* box) { emulator::come(box, 0); }
inline void arrive_expecting(Mailbox* box, int bytes) { emulator::come(box, bytes); }
inline void wait_for_mail(Mailbox* own, int parity) {
  emulator::Box& box = emulator::box_of(emulator::self().block, own);
  // As the hardware does: it only knows whether the phase in progress has the other parity.
  while (box.phases_ended % 2 == parity && !(emulator::cluster->ignored & emulator::kMail)) {
    box.arrivals.waiting.push_back(&emulator::self());
    emulator::leave();
  }
  synchronize_warp();
}
inline void send(Chunk* own, int rank, const Chunk& value, Mailbox* box) { emulator::send(own, rank, value, box); }
inline void send(Pair* own, int rank, const Pair& value, Mailbox* box) { emulator::send(own, rank, value, box); }
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
