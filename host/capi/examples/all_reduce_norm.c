/* Two processes reduce two rows: sum, residual, RMSNorm and its FP8 codes, on CPUs. Each prints its results' bits.
 *
 *   cc -std=c11 all_reduce_norm.c -I../include -L../../../target/release -lfused_collective_capi -o all_reduce_norm
 *   RANK=0 WORLD_SIZE=2 MASTER_PORT=29500 ./all_reduce_norm &
 *   RANK=1 WORLD_SIZE=2 MASTER_PORT=29500 ./all_reduce_norm
 *
 * On GPUs: FC_BACKEND_CUDA, addresses of device memory, a stream, and fc_synchronize before the results are read. */
#include <fused_collective.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 2, HIDDEN = 32, ELEMENTS = TOKENS * HIDDEN };

static void check(fc_status status) {
    if (status != FC_STATUS_OK) {
        fprintf(stderr, "error: %s\n", fc_error_text());
        exit(1);
    }
}

static fc_tensor floats(float *data, uint64_t length) {
    return (fc_tensor){.data = data, .length = length, .type = FC_TYPE_F32};
}

static void print(const char *name, const float *values) {
    printf("%s", name);
    for (int at = 0; at < ELEMENTS; at++) {
        uint32_t bits;
        memcpy(&bits, &values[at], sizeof bits);
        printf(" %08x", (unsigned)bits);
    }
    printf("\n");
}

int main(void) {
    /* Once for each group. Rank, size and key come from the launcher's variables. */
    fc_options options = {.size = sizeof options, .backend = FC_BACKEND_CPU, .max_row_bytes = HIDDEN * sizeof(float),
                          .deadline_ms = 20000};
    fc_communicator *communicator;
    check(fc_join(&options, NULL, &communicator));

    fc_operation operation = {.size = sizeof operation, .tokens = TOKENS, .hidden = HIDDEN, .dtype = FC_TYPE_F32,
                              .residual = FC_RESIDUAL_REPLICATED, .norm = FC_NORM_RMS, .epsilon = 1e-6f,
                              .quantization = FC_QUANTIZATION_FP8_STATIC, .keep_norm = 1};
    fc_plan plan = {.size = sizeof plan};
    check(fc_query(communicator, &operation, &plan));

    int rank = atoi(getenv("RANK"));
    float input[ELEMENTS], residual[ELEMENTS], gamma[HIDDEN], scale = 1.0f / 64.0f;
    for (int at = 0; at < ELEMENTS; at++) {
        input[at] = (float)(rank * 3 + at % 7) / 8.0f - 0.5f;
        residual[at] = (float)(at % 5) / 3.0f;
    }
    for (int at = 0; at < HIDDEN; at++)
        gamma[at] = 1.0f + (float)at / 64.0f;
    unsigned char *codes = malloc(plan.quant_bytes);

    /* As often as there are layers; every rank calls the same. The norm takes the input's place, the sum the residual's. */
    fc_tensors tensors = {.size = sizeof tensors,
                          .input = floats(input, ELEMENTS),
                          .residual = floats(residual, ELEMENTS),
                          .gamma = floats(gamma, HIDDEN),
                          .scale = floats(&scale, 1),
                          .residual_out = floats(residual, ELEMENTS),
                          .norm_out = floats(input, ELEMENTS),
                          .quant_out = {.data = codes, .length = plan.quant_bytes, .type = FC_TYPE_BYTES}};
    check(fc_enqueue(communicator, &operation, &tensors, NULL));

    print("sum", residual);
    print("norm", input);
    printf("codes");
    for (uint64_t at = 0; at < plan.quant_bytes; at++)
        printf(" %02x", codes[at]);
    printf("\n");
    free(codes);
    check(fc_leave(communicator));
    check(fc_free(communicator));
    return 0;
}
