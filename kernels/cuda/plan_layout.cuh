// The attention plan as the kernels read it; the authority is chunkllama/attention/plan_format.py.
#pragma once
#include "device.cuh"

constexpr int CHUNK = 64;  // tokens of a chunk

enum PlanHeader { NUM_ITEMS = 0, NUM_ROWS = 1, NUM_CLASS0_ITEMS = 4 };
enum ItemColumn {
  ROW_BEGIN = 0,
  ITEM_ROWS = 1,
  CHUNK_OFFSET = 2,
  NUM_TOKENS = 3,
  FIRST_POSITION = 4,
  PARTIAL_BASE = 5,
  FLAGS = 6,
  ITEM_COLUMNS = 8
};
enum ItemFlag { ITEM_MASK = 1, ITEM_WINDOW = 2 };
