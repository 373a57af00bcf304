/* A CUDA driver without a GPU, for the tests of driver.rs and module.rs: two devices whose calls check their arguments and
 * keep just enough state to answer. cuda.h has the true declarations: a definition that differs from them does not compile.
 */
#include <cuda.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { DEVICES = 2 };

static int initialised, retained[DEVICES], live_events;
static _Thread_local CUcontext current;

struct CUevent_st {
    unsigned flags;
    int polls;
    float time;
    CUcontext context;
};
struct CUfunc_st {
    char name[64];
    int shared;
};

static CUcontext context_of(CUdevice device) { return (CUcontext)(intptr_t)(0x1000 + device); }

#define NEED(condition, code)                                                                                          \
    if (!(condition)) return code;

CUresult cuInit(unsigned flags) {
    NEED(flags == 0, CUDA_ERROR_INVALID_VALUE)
    initialised = 1;
    return CUDA_SUCCESS;
}
CUresult cuDriverGetVersion(int *version) {
    *version = 13010;
    return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult code, const char **text) {
    NEED(code == CUDA_ERROR_INVALID_VALUE || code == CUDA_ERROR_NOT_FOUND || code == CUDA_ERROR_INVALID_PTX ||
             code == CUDA_ERROR_INVALID_HANDLE,
         CUDA_ERROR_INVALID_VALUE)
    *text = code == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
            : code == CUDA_ERROR_NOT_FOUND   ? "CUDA_ERROR_NOT_FOUND"
            : code == CUDA_ERROR_INVALID_PTX ? "CUDA_ERROR_INVALID_PTX"
                                             : "CUDA_ERROR_INVALID_HANDLE";
    return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
    *text = "as the fake driver says";
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
    NEED(initialised, CUDA_ERROR_NOT_INITIALIZED)
    *count = DEVICES;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    NEED(ordinal >= 0 && ordinal < DEVICES, CUDA_ERROR_INVALID_DEVICE)
    *device = ordinal;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int len, CUdevice device) {
    strncpy(name, device ? "Second fake" : "First fake", len);
    return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
    *bytes = (size_t)80 << 30;
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    memset(uuid->bytes, 0xa0 + device, sizeof uuid->bytes);
    return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
    switch (which) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = device ? 8 : 9; return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = device ? 6 : 0; return CUDA_SUCCESS;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    NEED(retained[device]++ == 0, CUDA_ERROR_INVALID_VALUE) /* once is enough */
    *context = context_of(device);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = current;
    return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
    current = context;
    return CUDA_SUCCESS;
}
CUresult cuMemGetInfo(size_t *free, size_t *total) {
    NEED(current, CUDA_ERROR_INVALID_CONTEXT)
    *free = current == context_of(0) ? 10 : 20;
    *total = 100;
    return CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
    NEED(current, CUDA_ERROR_INVALID_CONTEXT)
    NEED(count == 2 && options[0] == CU_JIT_ERROR_LOG_BUFFER && options[1] == CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
         CUDA_ERROR_INVALID_VALUE)
    if (memcmp(image, "\177ELF", 4) != 0) {
        strncpy(values[0], "no machine code", (size_t)values[1]);
        return CUDA_ERROR_INVALID_PTX;
    }
    *module = (CUmodule)(intptr_t)0x77;
    return CUDA_SUCCESS;
}
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    NEED(module == (CUmodule)(intptr_t)0x77, CUDA_ERROR_INVALID_HANDLE)
    NEED(strcmp(name, "missing") != 0, CUDA_ERROR_NOT_FOUND)
    *function = calloc(1, sizeof(struct CUfunc_st));
    strncpy((*function)->name, name, sizeof (*function)->name - 1);
    (*function)->shared = 48 << 10;
    return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
    *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 40
             : which == CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES ? 4096
             : which == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES  ? 0
                                                            : -1;
    return *value < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
    NEED(which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, CUDA_ERROR_INVALID_VALUE)
    function->shared = value;
    return CUDA_SUCCESS;
}
/* `probe(long long *out, long long whole, float part, void *absent)` writes what the launch got. */
CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
    NEED(current, CUDA_ERROR_INVALID_CONTEXT)
    NEED(gx && gy == 1 && gz == 1 && bx && by == 1 && bz == 1 && (int)shared <= function->shared && !extra,
         CUDA_ERROR_INVALID_VALUE)
    if (strcmp(function->name, "probe") == 0) {
        long long *out = *(long long **)arguments[0];
        out[0] = *(long long *)arguments[1];
        out[1] = (long long)(1000 * *(float *)arguments[2]);
        out[2] = *(intptr_t *)arguments[3];
        out[3] = gx, out[4] = bx, out[5] = shared, out[6] = (intptr_t)stream, out[7] = (intptr_t)current;
    }
    return CUDA_SUCCESS;
}
CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    NEED(flags == 0 && event->time > 0, CUDA_ERROR_INVALID_VALUE)
    return CUDA_SUCCESS;
}
CUresult cuStreamSynchronize(CUstream stream) {
    NEED(current, CUDA_ERROR_INVALID_CONTEXT)
    return CUDA_SUCCESS;
}
CUresult cuEventCreate(CUevent *event, unsigned flags) {
    NEED(current, CUDA_ERROR_INVALID_CONTEXT)
    *event = calloc(1, sizeof **event);
    (*event)->flags = flags;
    (*event)->context = current;
    live_events++;
    return CUDA_SUCCESS;
}
CUresult cuEventRecord(CUevent event, CUstream stream) {
    static float clock;
    NEED(event->context == current, CUDA_ERROR_INVALID_HANDLE)
    event->time = clock += 1.5f;
    event->polls = 0;
    return CUDA_SUCCESS;
}
CUresult cuEventQuery(CUevent event) { return event->polls++ == 0 ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS; }
CUresult cuEventSynchronize(CUevent event) { return CUDA_SUCCESS; }
#undef cuEventElapsedTime /* the older entry, which every driver still has */
CUresult cuEventElapsedTime(float *ms, CUevent start, CUevent end) {
    NEED(!((start->flags | end->flags) & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE)
    *ms = end->time - start->time;
    return CUDA_SUCCESS;
}
CUresult cuEventDestroy(CUevent event) {
    live_events--;
    free(event);
    return CUDA_SUCCESS;
}

/* NVRTC asks for tables of its own, which are optional. */
CUresult cuGetExportTable(const void **table, const CUuuid *id) {
    *table = NULL;
    return CUDA_ERROR_INVALID_VALUE;
}

/* libtorch's CUDA half, as far as it is asked; and the events that were not destroyed. */
int32_t aoti_torch_get_current_cuda_stream(int32_t device, void **stream) {
    if (device >= DEVICES) return 1;
    *stream = (void *)(intptr_t)(0x500 + device);
    return 0;
}
int fake_live_events(void) { return live_events; }
