// All that is compiled for one instruction set; kernels.cpp says which.
#include "walk.h"
#include "step.h"
#include "penalty.h"
#include "packed.h"
#undef HTA_ISA
#undef HTA_BYTES
