// What Python calls. Plain C: pointers to tensors' memory, sizes, structures of kernels.h.
// Every function returns 0, or 1 if it computed nothing for lack of working memory; those about
// threads say what they got.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

#include "kernels.h"

extern "C" {

// To be called once, before anything else. False if this process may not use the tile registers.
int cloudlm_start() {
#ifdef __AMX_TILE__
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
  return 1;
#endif
}

int cloudlm_threads(int threads, const int* cpus, int spin_us) {
  return Team::the().resize(threads, cpus, spin_us);
}

// Asks for large pages; to be called before the memory is touched. Only advice.
void cloudlm_large_pages(void* memory, size_t bytes) { madvise(memory, bytes, MADV_HUGEPAGE); }

int cloudlm_pack(int kind, const void* weights, int rows, int columns, int k, int gated, char* packed) {
  Team& team = Team::the();
  team.run([&](int me) { pack(team, me, kind, weights, rows, columns, k, gated, packed); });
  return 0;
}

// 1: not for such groups.
int cloudlm_quantize_int4(const uint16_t* weights, int rows, int columns, int group, uint8_t* codes,
                          float* scales) {
  if (!can_quantize_int4(group)) return 1;
  Team& team = Team::the();
  team.run([&](int) { quantize_int4(team, weights, rows, columns, group, codes, scales); });
  return 0;
}

int cloudlm_linear(const Linear* w, const Input* in, const Output* out, int tokens, int path) {
  Team& team = Team::the();
  if (!linear_room(team, *w, tokens)) return 1;
  team.run([&](int me) { linear(team, me, *w, *in, *out, tokens, path); });
  return 0;
}

int cloudlm_rms_norm(const Input* in, float* residual, const Output* out, int tokens, int size) {
  Team& team = Team::the();
  team.run([&](int me) { rms_norm(team, me, *in, residual, *out, tokens, size); });
  return 0;
}

int cloudlm_silu_mul(const Input* gate_up, const Output* out, int tokens, int size) {
  Team& team = Team::the();
  team.run([&](int me) { silu_mul(team, me, *gate_up, *out, tokens, size); });
  return 0;
}

int cloudlm_rope_store(const Rope* rope, int tokens) {
  Team& team = Team::the();
  team.run([&](int me) { rope_store(team, me, *rope, tokens); });
  return 0;
}

int cloudlm_attention(const Attention* a) {
  Team& team = Team::the();
  if (!attention_room(team, *a)) return 1;
  team.run([&](int me) { attention(team, me, *a); });
  return 0;
}

int cloudlm_run_stack(const Layer* layers, int count, const Stack* stack, int plans) {
  Team& team = Team::the();
  for (int i = 0; i < count; i++)
    for (const Linear* w : {&layers[i].qkv, &layers[i].out, &layers[i].gate_up, &layers[i].down})
      if (!linear_room(team, *w, stack->tokens)) return 1;
  for (int i = 0; i < plans; i++)
    if (!attention_room(team, stack->plans[i])) return 1;
  team.run([&](int me) { run_stack(team, me, layers, count, *stack); });
  return 0;
}

}  // extern "C"
