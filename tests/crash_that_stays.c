/* Preloaded into a server: at SIGUSR1 one of its threads looks as if it had crashed, and stays so. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

static void stay(int number) {
    (void)number;
    sigset_t deadly;
    sigemptyset(&deadly);
    sigaddset(&deadly, SIGABRT);
    pthread_sigmask(SIG_SETMASK, &deadly, NULL);
    for (;;) pause();
}

__attribute__((constructor)) static void prepare(void) {
    if (!strcmp(program_invocation_short_name, "tritonserver")) signal(SIGUSR1, stay);
}
