// HeadContext: what all parts of one (sequence, layer, KV head) know of it.
#pragma once

#include "icecache/config.h"
#include "icecache/types.h"
#include "pages/page_pool.h"

namespace icecache {

// A page of an index holds S tokens as kv_dtype says. One of a run (sink, tail) has the same bytes,
// and holds as many tokens in the model's type as they have room for.
struct HeadContext {
  PagePool* pool = nullptr;  // outlives the head
  PageOwner owner;
  const Config* config = nullptr;  // resolved; outlives the head
  int head_dim = 0;
  int group = 0;
  DType dtype = DType::kFloat32;  // the model's
  float scale = 0.0f;             // softmax scale
  float logit_softcap = 0.0f;     // 0: none
  bool attends_all = false;       // no query picks tokens: an index only holds them
  bool in_prompt = false;         // of a segment: it is merged when the prompt has ended

  // Of rows in the pages of an index.
  DType stored() const { return config->stored_dtype(dtype); }
  std::size_t stored_row_bytes() const { return row_bytes_of(stored(), head_dim); }
  std::size_t row_bytes() const { return row_bytes_of(dtype, head_dim); }
  int run_page_size() const {
    return static_cast<int>(config->page_size * stored_row_bytes() / row_bytes());
  }
};

}  // namespace icecache
