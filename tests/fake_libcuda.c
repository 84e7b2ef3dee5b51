// A libcuda.so.1 that loads every kernel, runs none, and remembers what was launched: for all of Triton's own road on the host.

#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
} Launch;
typedef struct {
  char name[64];
  Launch launch;
} Seen;

static Seen seen[1024];
static unsigned count;

unsigned launches(Seen* to) {  // since it was last asked
  unsigned n = count;
  memcpy(to, seen, n * sizeof(Seen));
  count = 0;
  return n;
}

int cuLaunchKernelEx(const Launch* launch, const char* name, void** params, void** extra) {
  strncpy(seen[count].name, name, sizeof seen[count].name - 1);
  seen[count++].launch = *launch;
  return count == 1024;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  const int shared_optin = 97, registers = 12, processors = 16, warp = 10;
  *value = attribute == shared_optin ? 232448 : attribute == registers ? 65536 : attribute == processors ? 132 : attribute == warp ? 32 : 0;
  return 0;
}

static char names[1024][64];
int cuModuleLoadData(void** module, const void* data) { return *module = (void*)1, 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
  static unsigned functions;
  if (functions == 1024) return 1;
  *function = strncpy(names[functions++], name, 63);
  return 0;
}
int cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }  // 0: threads
int cuPointerGetAttribute(uint64_t* value, int attribute, uint64_t pointer) { return *value = pointer, 0; }

int cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
int cuCtxSetCurrent(void* context) { return 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void* function, int config) { return 0; }
int cuCtxGetLimit(uint64_t* value, int limit) { return *value = 0, 0; }
int cuCtxSetLimit(int limit, uint64_t value) { return 0; }
int cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return *clusters = 1, 0; }
int cuTensorMapEncodeTiled(void) { return 1; }
int cuGetErrorString(int code, const char** text) { return *text = code ? "refused by fake_libcuda.c" : "none", 0; }
