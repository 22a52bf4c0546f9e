// The arithmetic of hta_fused, once, for every C++ and CUDA kernel. No torch and no CUDA header.
//
// V is what one lane group holds: a scalar (CUDA, loop tails) or a vector of lanes (the CPU kernel).
// C is what a coefficient is: a scalar where all lanes share a label, a V where each has its own.
//
// Notation: theta, eta the two copies; anchor the point they are pulled to; g the loss's gradient; v the
// momentum buffer. "Equation (3)" is H(theta, eta; L) = f(theta) + L |theta_1 - anchor_1|^2 + f(eta)
// + L |eta_2 - anchor_2|^2 + |theta - eta|^2 / L.
#pragma once
#ifdef __CUDACC_RTC__  // NVRTC has no standard headers
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned;
using int64_t = long long;
using uintptr_t = unsigned long long;
#else
#include <cstdint>
#endif

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define HTA_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define HTA_INLINE inline __attribute__((always_inline))
#else
#define HTA_INLINE inline
#endif

namespace hta {

constexpr int64_t kTile = 1024;  // elements that share one code; ops.py asks the library for it
constexpr int kLabels = 3;       // 0: coupled only, 1: anchored in theta, 2: anchored in eta

// What a parameter group decides: one row of the op's `hyper`.
template <class T>
struct Hyper {
  T lr_grad, lr_momentum;  // a = x - lr_grad * g - lr_momentum * v   (Nesterov: lr, lr * momentum; else 0, lr)
  T momentum, weight_decay;
  T pull, couple;  // explicit mode: 2L and 2/L, the gradients of (3)'s quadratic terms; implicit mode: 0
};
constexpr int kHyper = 6;
constexpr int kTable = 6;  // numbers in one label's 2x3 table

// What a label decides: the 2x3 table applied to (a_theta, a_eta, anchor), and who feels the anchor (0 or 1).
template <class C>
struct Rule {
  C k[2][3];
  C anchored_theta, anchored_eta;
};

// The sums that come out of the same pass.
template <class V>
struct Sums {
  V anchor, distance;  // |theta_1 - anchor_1|^2 + |eta_2 - anchor_2|^2 and |theta - eta|^2
  V poison;            // NaN once any gradient was not finite, else 0
};

template <class V, class C>
HTA_INLINE void add_squares(Sums<V>& sums, V theta, V eta, V anchor, const Rule<C>& rule) {
  const V to_theta = theta - anchor, to_eta = eta - anchor, gap = theta - eta;
  sums.anchor += rule.anchored_theta * (to_theta * to_theta) + rule.anchored_eta * (to_eta * to_eta);
  sums.distance += gap * gap;
}

// Gradients of the quadratic terms of equation (3): pull = 2L, couple = 2/L.
// Differences first: at small L the two copies agree in most digits, and only a difference keeps the rest.
template <class V, class T, class C>
HTA_INLINE void penalty_gradient(V& g_theta, V& g_eta, V theta, V eta, V anchor, T pull, T couple, const Rule<C>& rule) {
  const V coupling = couple * (theta - eta);
  g_theta = pull * (rule.anchored_theta * (theta - anchor)) + coupling;
  g_eta = pull * (rule.anchored_eta * (eta - anchor)) - coupling;
}

// One SGD step of one copy: x is left, the proposal a is returned.
template <bool kMomentum, class V, class T>
HTA_INLINE V sgd(V x, V g, V& v, const Hyper<T>& hyper) {
  if (!kMomentum) return x - hyper.lr_grad * g;
  v = hyper.momentum * v + g;
  return x - (hyper.lr_grad * g + hyper.lr_momentum * v);
}

// The coupled step: SGD's proposals for both copies, then the label's table.
template <bool kMomentum, class V, class T, class C>
HTA_INLINE void step(V& theta, V& eta, V g_theta, V g_eta, V& v_theta, V& v_eta, V anchor,
                     const Hyper<T>& hyper, const Rule<C>& rule, Sums<V>& sums) {
  sums.poison += (g_theta - g_theta) + (g_eta - g_eta);
  V quadratic_theta, quadratic_eta;
  penalty_gradient(quadratic_theta, quadratic_eta, theta, eta, anchor, hyper.pull, hyper.couple, rule);
  g_theta += hyper.weight_decay * theta + quadratic_theta;
  g_eta += hyper.weight_decay * eta + quadratic_eta;
  const V a_theta = sgd<kMomentum>(theta, g_theta, v_theta, hyper);
  const V a_eta = sgd<kMomentum>(eta, g_eta, v_eta, hyper);
  theta = rule.k[0][0] * a_theta + rule.k[0][1] * a_eta + rule.k[0][2] * anchor;
  eta = rule.k[1][0] * a_theta + rule.k[1][1] * a_eta + rule.k[1][2] * anchor;
  add_squares(sums, theta, eta, anchor, rule);
}

}  // namespace hta
