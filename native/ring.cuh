// The stream: rows of a weight past an activation, by bulk copies through a ring of stages in shared memory.
//
//     global memory                     shared memory of CTA `cta_rank`                                  shared memory of the row's owner
//     weight rows  --bulk copies-->  ring of stages --consumer warps--> segment sums --PartialSums--> slots --epilogue warp--> ending
//
// A cluster of kClusterSize CTAs takes a range of rows and walks it in fills of kRows, one stage each. Each CTA holds a slice of every row: whole
// segments. In front of the stream stands a source, which gives a lane its activations (activation.cuh), behind it an ending, which takes a
// row's sum (endings.cuh). The stream knows neither.
//
//   warp 0        producer   fills the ring: stages_in_flight stages under way at a time
//   warp 1        epilogue   adds up the segment sums of the rows that this CTA owns, and hands each row's sum to the ending
//   warps 2 ...   consumers  in groups, a warp for each segment of the slice; group g sums the fills g, g + num_groups, ...
//
// Barriers, who arrives, and how many bytes they expect:
//   full[stage]          producer, 1 + the stage's bytes     -> consumers: the stage holds the fill's weights
//                                                           -> producer: one stage fewer is in flight
//   empty[stage]         a consumer warp for every segment   -> producer: the stage may be overwritten
//   activation_barrier   first consumer, 1 + slice's bytes   -> consumers (an activation in shared memory only)
//   the slots' two       see PartialSums
//
// Dependent launch: the kernel may start while earlier ones are still running. Each thread that reads what these wrote, or writes what they may
// be reading, waits for them first: the producer (unless the weight may be prefetched), the consumers for the activation, the epilogue for
// everything else. Then the epilogue allows the next kernel to start.
//
// Read it beside reference/row_sums.py: sections of the same name stand in the same order. Stages, barriers and producer stand here only.
#pragma once

#include <activation.cuh>
#include <cluster.cuh>
#include <endings.cuh>
#include <geometry.h>
#include <plan.h>
#include <ptx.cuh>
#include <sums.cuh>

constexpr uint32_t kProducerWarp = 0;
constexpr uint32_t kEpilogueWarp = 1;
constexpr uint32_t kFirstConsumerWarp = 2;
constexpr uint32_t kMaxThreads = (kFirstConsumerWarp + kMaxConsumerWarps) * kNumLanes;

// Where the stages and their barriers are.
struct Stages {
  ptx::SharedAddress smem;
  uint32_t ring;  // offset
  uint32_t stage_bytes;
  uint32_t slice_bytes;

  MLPDOWN_DEVICE ptx::SharedAddress full(uint32_t stage_idx) const { return smem + SharedLayout::kFullBarriers + stage_idx * kBarrierBytes; }
  MLPDOWN_DEVICE ptx::SharedAddress empty(uint32_t stage_idx) const { return smem + SharedLayout::kEmptyBarriers + stage_idx * kBarrierBytes; }
  MLPDOWN_DEVICE ptx::SharedAddress row(uint32_t stage_idx, uint32_t row) const { return smem + ring + stage_idx * stage_bytes + row * slice_bytes; }
};

// One lane, which fills the stages in turn.
template <uint32_t kRows, bool kSplitsRows>
class Producer {
 public:
  MLPDOWN_DEVICE Producer(const MlpDownProblem& problem, const Stages& stages, const RowRange& rows, const Slice& slice)
      : row_length_(problem.intermediate_dim),
        rows_left_(rows.count),
        weight_(static_cast<const uint16_t*>(problem.weight) + static_cast<uint64_t>(rows.first) * problem.intermediate_dim +
                slice.first_vector * kVectorSize),
        stages_(stages) {}

  // Initialises the barriers. Memory idles until the first copy, so a stage is filled as soon as its own barrier stands, and the rest is set up
  // behind the copies.
  MLPDOWN_DEVICE void start(const MlpDownPlan& plan, uint32_t segments_per_cta) {
#pragma unroll 1
    for (uint32_t stage_idx = 0; stage_idx < plan.num_stages; ++stage_idx) {
      ptx::mbarrier_init(stages_.full(stage_idx), 1);
      ptx::fence_mbarrier_init();
      // Only a weight that nobody is writing may be read before the wait for earlier kernels.
      if (stage_idx == 0 && !plan.weight_prefetch) ptx::griddepcontrol_wait();
      if (stage_idx < plan.stages_in_flight && rows_left_ > 0) fill(plan.num_stages);
    }
#pragma unroll 1
    for (uint32_t stage_idx = 0; stage_idx < plan.num_stages; ++stage_idx) ptx::mbarrier_init(stages_.empty(stage_idx), segments_per_cta);
    ptx::fence_mbarrier_init();
  }

  MLPDOWN_DEVICE void run(const MlpDownPlan& plan) {
    RingPosition oldest_in_flight;
    for (uint32_t fill_idx = plan.stages_in_flight; rows_left_ > 0; ++fill_idx) {
      // An SM's copies share one queue. Issue only as many as keep memory busy: more would delay the activation and the first stage.
      ptx::mbarrier_wait(stages_.full(oldest_in_flight.idx), oldest_in_flight.phase);
      oldest_in_flight.advance(1, plan.num_stages);
      if (fill_idx >= plan.num_stages) ptx::mbarrier_wait(stages_.empty(next_.idx), next_.phase ^ 1);
      fill(plan.num_stages);
    }
  }

 private:
  MLPDOWN_DEVICE void fill(uint32_t num_stages) {
    const uint32_t num_rows = smaller(rows_left_, kRows);
    const ptx::SharedAddress barrier = stages_.full(next_.idx);
    ptx::mbarrier_arrive_expect_tx(barrier, num_rows * stages_.slice_bytes);
    if constexpr (kSplitsRows) {
      for (uint32_t row = 0; row < num_rows; ++row) {
        ptx::cp_async_bulk_evict_first(stages_.row(next_.idx, row), weight_ + row * row_length_, stages_.slice_bytes, barrier);
      }
    } else {
      // Whole rows follow each other in memory: one copy.
      ptx::cp_async_bulk_evict_first(stages_.row(next_.idx, 0), weight_, num_rows * stages_.slice_bytes, barrier);
    }
    weight_ += static_cast<uint64_t>(kRows) * row_length_;
    rows_left_ -= num_rows;
    next_.advance(1, num_stages);
  }

  uint32_t row_length_;
  uint32_t rows_left_;
  const uint16_t* weight_;  // the slice of the next row
  Stages stages_;
  RingPosition next_;
};

template <class Source, class Ending, uint32_t kClusterSize, uint32_t kRows>
MLPDOWN_DEVICE void stream(const MlpDownProblem& problem, const MlpDownPlan& plan, const Geometry& geometry) {
  // ---- Sizes ----
  const uint32_t warp_idx = ptx::thread_idx() / kNumLanes;
  const uint32_t lane = ptx::thread_idx() % kNumLanes;
  const Cluster<kClusterSize> cluster;
  const Slice slice = cluster.slice(geometry.segments);
  const RowRange rows = geometry.shares.rows_of(cluster.idx);
  const uint32_t num_fills = (rows.count + kRows - 1) / kRows;
  const auto rows_of_fill = [&](uint32_t fill_idx) { return smaller(rows.count - fill_idx * kRows, kRows); };

  // ---- Shared memory ----
  const ptx::SharedAddress smem = ptx::dynamic_shared_memory();
  const Stages stages{smem, Source::template ring<kRows>(geometry), geometry.stage_bytes, slice.num_bytes};
  const PartialSums<kClusterSize, kRows> partial_sums(smem);
  Source source;
  Producer<kRows, Cluster<kClusterSize>::kSplitsRows> producer(problem, stages, rows, slice);

  // ---- Barriers, and the first copies ----
  // Each barrier is initialised by a warp that uses it. No other warp waits for earlier kernels before all have met: that would hold back a
  // producer that may prefetch.
  if (warp_idx == kProducerWarp && lane == 0) producer.start(plan, slice.num_segments());
  if (warp_idx == kEpilogueWarp && lane == 0) partial_sums.init(slice.num_segments());
  if (warp_idx == kFirstConsumerWarp && lane == 0) source.init(smem);
  ptx::syncwarp();
  cluster.sync();

  // ---- Producer: one lane ----
  if (warp_idx == kProducerWarp) {
    if (lane == 0) producer.run(plan);
    return;
  }

  // ---- Consumers: each warp sums its segment of the rows, lane by lane, then over the lanes ----
  if (warp_idx >= kFirstConsumerWarp) {
    const uint32_t consumer_idx = warp_idx - kFirstConsumerWarp;
    const uint32_t segment = slice.first_segment + (consumer_idx & (slice.num_segments() - 1));
    const uint32_t group = consumer_idx >> slice.log2_num_segments;
    const uint32_t num_groups = plan.num_consumer_warps >> slice.log2_num_segments;
    const uint32_t first_vector = geometry.segments.first_vector(segment);
    // Kept: a consumer would else work these out between each wait for a stage and its first load.
    const LaneSegment lane_segment{ptx::keep(first_vector - slice.first_vector + lane),
                                   ptx::keep(geometry.segments.first_vector(segment + 1) - first_vector), lane};

    ptx::griddepcontrol_wait();
    source.template load<kRows>(static_cast<const uint16_t*>(problem.mlp_intermediate) + slice.first_vector * kVectorSize, slice.num_bytes, smem,
                                warp_idx == kFirstConsumerWarp, lane_segment);
    RingPosition stage{group};
    RingPosition slot{group};
    for (uint32_t fill_idx = group; fill_idx < num_fills; fill_idx += num_groups) {
      const uint32_t num_rows = rows_of_fill(fill_idx);
      ptx::mbarrier_wait(stages.full(stage.idx), stage.phase);
      ptx::SharedAddress weight_rows[kRows];
      // Rows that the last fill lacks: its last row is summed again, and not stored.
#pragma unroll
      for (uint32_t row = 0; row < kRows; ++row) weight_rows[row] = stages.row(stage.idx, smaller(row, num_rows - 1));
      float accumulators[kRows][kVectorSize] = {};
      source.template accumulate<kRows>(weight_rows, lane_segment, accumulators);

      // All that this warp needs of the stage is in registers.
      ptx::syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(stages.empty(stage.idx));

      // ---- Segment sums meet, at the owner of the row ----
      const float segment_sum = sum_segment<kRows>(accumulators, lane);
      partial_sums.store(slot, fill_idx < kNumPartialSlots, num_rows, segment, lane, segment_sum);
      stage.advance(num_groups, plan.num_stages);
      slot.advance(num_groups, kNumPartialSlots);
    }
    return;
  }

  // ---- Epilogue: segments in order, then the ending ----
  // This warp reads what earlier kernels wrote, and writes what they may still be reading, so it waits. Only now may the next grid start: its CTAs
  // line up behind these, and its launch costs no time. No more than two grids are ever resident.
  ptx::griddepcontrol_wait();
  ptx::griddepcontrol_launch_dependents();
  if (cluster.cta_rank >= partial_sums.kNumOwners) return;

  // Lanes take the owned rows of as many fills as they reach, a window, so that the ending's loads for a window are under way together, ahead of
  // its sums. With two owned rows a fill, lane 5 takes the second row of the window's third fill:
  //     lane            0 1   2 3   4 5   ...  30 31
  //     fill of window   0     1     2    ...    15
  constexpr uint32_t kOwnedRows = partial_sums.kOwnedRows;
  constexpr uint32_t kFillsPerWindow = kNumLanes / kOwnedRows;
  const uint32_t fill_of_window = lane / kOwnedRows;
  const uint32_t owned_row = lane % kOwnedRows;
  RingPosition slot;
  uint32_t row = 0;
  Ending ending;
  for (uint32_t fill_idx = 0; fill_idx < num_fills; ++fill_idx) {
    if (fill_idx % kFillsPerWindow == 0) {
      row = (fill_idx + fill_of_window) * kRows + owned_row * kClusterSize + cluster.cta_rank;
      if (row < rows.count) ending.load(problem, rows.first + row);
    }
    partial_sums.wait(slot, cluster.cta_rank, rows_of_fill(fill_idx), geometry.segments.count(), lane);
    const bool owns_row = fill_of_window == fill_idx % kFillsPerWindow && row < rows.count;
    float sum = 0.0f;
    if (owns_row) sum = sum_segments(partial_sums.segment_sums(slot.idx, owned_row), geometry.segments.count());
    // The slot is free for the fill kNumPartialSlots later. Without such a fill nobody waits, and the other ranks may be gone.
    ptx::syncwarp();
    if (fill_idx + kNumPartialSlots < num_fills) partial_sums.release(slot, lane);
    if (owns_row) ending.write(problem, rows.first + row, sum);
    slot.advance(1, kNumPartialSlots);
  }
}

// kVectors of the activation in a lane's registers, or 0 for shared memory.
template <class Format, uint32_t kClusterSize, uint32_t kRows, uint32_t kVectors>
MLPDOWN_KERNEL(kMaxThreads, 1)
ring(MLPDOWN_PARAMETER MlpDownProblem problem, MLPDOWN_PARAMETER MlpDownPlan plan, MLPDOWN_PARAMETER Geometry geometry) {
#if MLPDOWN_SM_90_OR_NEWER
  stream<SourceOf<Format, kVectors>, Ending<Format>, kClusterSize, kRows>(problem, plan, geometry);
#endif
}
