// Two-phase partition attention on the plan (ChunkAttention, arXiv 2402.15220, section 3.2): items
// with many rows are the chunk-first phase, items of one sequence the sequence-first phase; a merge
// joins the partials of each row.
#pragma once
#include "api.h"
#include "team.h"

namespace chunkllama {

// Takes units (item, kv head) until all are done. Partials of rows that have several go to the
// workspace.
void attention_units(const AttentionArgs& args, Phase& phase);

// Merges the partials of the rows that have several: all of (row, query head) in [begin, end).
void merge_partials(const AttentionArgs& args, int64_t begin, int64_t end);

}  // namespace chunkllama
