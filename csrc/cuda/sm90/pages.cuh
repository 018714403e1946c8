// Where the keys of a batch row lie: one after the other in an entry of k and v, or in pages.
#pragma once
#include "ptx.cuh"

namespace flashjax::sm90 {

// What one TMA box brings must lie in one page, and tiles begin at multiples of their size: so a
// box holds gcd(page, tile) keys.
struct Pages {
  const int* table;  // [b, per_row]; null: a row's keys are those of one entry
  const int* entry;  // [b]: that entry; null: entry b
  int per_row;       // pages of a row
  int count;         // pages, or entries, in all
  int size;          // keys of a page, or of an entry
  int box;           // keys of a box
};

struct Place {
  int page, row;  // page < 0: the table names one that does not exist
  DI bool good() const { return page >= 0; }
};

// `early`: the kernel before may be writing it yet, so that it is good for a guess and must not
// stay in the L1.
DI int read_int(const int* x, bool early) { return early ? __ldcg(x) : *x; }

// Key `key` of batch row b, which must be less than per_row * size, or size. An entry that does not
// exist has no keys (sequence.h), so it is not looked for. The page is what the table says, which
// is yet to be checked: who reads it waits for the memory.
DI Place ask_place(const Pages& p, int b, int key, bool early = false) {
  if (!p.table) return {p.entry ? read_int(p.entry + b, early) : b, key};
  const int at = key / p.size;
  return {read_int(p.table + (long long)b * p.per_row + at, early), key - at * p.size};
}
DI Place checked(const Pages& p, const Place& x) {
  return {(u32)x.page < (u32)p.count ? x.page : -1, x.row};
}
DI Place place(const Pages& p, int b, int key) { return checked(p, ask_place(p, b, key)); }

}  // namespace flashjax::sm90
