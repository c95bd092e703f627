// HeadContext: what all parts of one (sequence, layer, KV head) know of it.
#pragma once

#include "icecache/config.h"
#include "icecache/types.h"
#include "pages/page_pool.h"

namespace icecache {

struct HeadContext {
  PagePool* pool = nullptr;  // outlives the head
  PageOwner owner;
  const Config* config = nullptr;  // resolved; outlives the head
  int head_dim = 0;
  int group = 0;
  DType dtype = DType::kFloat32;
  float scale = 0.0f;          // softmax scale
  float logit_softcap = 0.0f;  // 0: none
};

}  // namespace icecache
