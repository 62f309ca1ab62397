/* Load generator: subscribers and publishers in one process, on one core, under one clock.
   Phases, each bounded in time: connect, hold, publish, drain, report. Usage: options.h. */
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "clock.h"
#include "conn.h"
#include "pub.h"
#include "report.h"
#include "sub.h"
#include "turn.h"

#define SLOW_READ_INTERVAL_NS (20 * NS_PER_MS)

static void die(const char *what, const char *detail) {
    fprintf(stderr, "load: %s: %s\n", what, detail);
    exit(1);
}

static void *must_calloc(size_t count, size_t size) {
    void *memory = calloc(count ? count : 1, size);
    if (!memory) die("out of memory", "fewer connections would fit");
    return memory;
}

static void raise_file_limit(void) {
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit)) return;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static struct sockaddr_in parse_target(const char *text) {
    char host[64];
    unsigned port = 0;
    struct sockaddr_in target = {.sin_family = AF_INET};
    if (sscanf(text, "%63[0-9.]:%u", host, &port) != 2 || port > 65535 ||
        inet_pton(AF_INET, host, &target.sin_addr) != 1)
        die("target must be IPV4:PORT", text);
    target.sin_port = htons((uint16_t)port);
    return target;
}

static void prepare(struct run *run) {
    const struct options *o = &run->options;
    run->target = parse_target(o->target);
    run->pub_target = *o->pub_target ? parse_target(o->pub_target) : run->target;
    run->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    run->sub_count = (size_t)(o->subs + o->slow + o->stalled);
    run->pub_count = strcmp(o->pub_kind, "none") ? (size_t)o->pubs : 0;
    run->read_buffer = must_calloc(1, READ_HEADROOM + READ_BYTES);
    run->subs = must_calloc(run->sub_count, sizeof *run->subs);
    run->pubs = must_calloc(run->pub_count, sizeof *run->pubs);
    run->tracks = must_calloc(run->sub_count * run->pub_count, sizeof *run->tracks);
    run->readers_of = must_calloc((size_t)o->topics, sizeof *run->readers_of);
    run->slow_readers_of = must_calloc((size_t)o->topics, sizeof *run->slow_readers_of);
    if (run->pub_count == 1 && o->topics == 1)
        run->rounds = must_calloc(ROUND_SLOTS, sizeof *run->rounds);
    run->sub_connects.wanted = run->sub_count;
    run->pub_connects.wanted = run->pub_count;
    subs_open(run);
    pubs_open(run);
}

/* The harness reads memory and CPU between these marks. */
static void mark(const char *phase) { fprintf(stderr, "phase %s\n", phase); }

static struct conn *conn_at(struct run *run, bool is_sub, size_t index) {
    return is_sub ? &run->subs[index].conn : &run->pubs[index].conn;
}

static void dial(struct run *run, bool is_sub, struct connecting *stats) {
    uint64_t window = (uint64_t)run->options.connect_window;
    uint64_t deadline = now_ns() + (uint64_t)(run->options.connect_timeout * 1e9);
    size_t next = 0;
    while (stats->established + stats->failed < stats->wanted && now_ns() < deadline) {
        while (next < stats->wanted && (!window || stats->pending < window))
            conn_start(run, conn_at(run, is_sub, next++), stats);
        turn_take(run, now_ns() + 100 * NS_PER_MS);
    }
    stats->failed = stats->wanted - stats->established;
}

static double seconds_of_pid(const char *pid) {
    clockid_t clock;
    if (clock_getcpuclockid((pid_t)atoi(pid), &clock)) die("no such server process", pid);
    return (double)clock_ns(clock) / 1e9;
}

/* By the scheduler's nanoseconds: /proc/PID/stat has ticks of 10 ms, too coarse for a short run. */
static double server_cpu_seconds(const struct options *options) {
    double total = 0;
    char pids[256];
    char *rest = NULL;
    snprintf(pids, sizeof pids, "%s", options->server_pids);
    for (char *pid = strtok_r(pids, ",", &rest); pid; pid = strtok_r(NULL, ",", &rest))
        total += seconds_of_pid(pid);
    return total;
}

/* All time that the machine's cores did not idle, in ticks of 10 ms: what is left after the server's
   and the load's is what others took, and a result measured beside them is not one to keep. */
static double busy_cpu_seconds(void) {
    unsigned long long user = 0, nice = 0, system = 0, idle, iowait, irq = 0, softirq = 0;
    FILE *stat = fopen("/proc/stat", "r");
    if (!stat) return 0;
    int fields = fscanf(stat, "cpu %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle,
                        &iowait, &irq, &softirq);
    fclose(stat);
    if (fields != 7) return 0;
    return (double)(user + nice + system + irq + softirq) / (double)sysconf(_SC_CLK_TCK);
}

static uint64_t earlier(uint64_t a, uint64_t b) { return a < b ? a : b; }

static void tick_slow_readers(struct run *run, uint64_t now, uint64_t *next) {
    if (!run->options.slow || now < *next) return;
    slow_subs_read(run);
    *next = now + SLOW_READ_INTERVAL_NS;
}

static void hold(struct run *run) {
    uint64_t end = now_ns() + (uint64_t)(run->options.hold * 1e9);
    uint64_t slow_next = 0;
    for (uint64_t now; (now = now_ns()) < end;) {
        tick_slow_readers(run, now, &slow_next);
        turn_take(run, earlier(end, now + SLOW_READ_INTERVAL_NS));
    }
}

static void publish(struct run *run) {
    uint64_t slow_next = 0;
    run->publishing.first_ns = now_ns() + NS_PER_MS;
    run->publishing.last_ns = run->publishing.first_ns;
    run->measure_from_ns =
        run->publishing.first_ns + (uint64_t)(run->options.warmup * 1e9);
    while (!pubs_are_done(run)) {
        uint64_t now = now_ns();
        uint64_t wake = now + SLOW_READ_INTERVAL_NS;
        tick_slow_readers(run, now, &slow_next);
        if (now < run->publishing.first_ns)
            wake = run->publishing.first_ns;
        else if (!pubs_send_due(run, now))
            wake = earlier(wake, pubs_next_due_ns(run));
        turn_take(run, wake);
    }
    uint64_t now = now_ns();
    if (now > run->publishing.last_ns) run->publishing.last_ns = now;
}

/* Slow readers are not waited for: at their pace it could take hours. */
static bool is_drained(const struct run *run) {
    return run->fast.unique >= run->fast.expected && pubs_have_all_answers(run);
}

static void drain(struct run *run) {
    uint64_t deadline = now_ns() + (uint64_t)(run->options.drain * 1e9);
    uint64_t slow_next = 0;
    for (uint64_t now; !is_drained(run) && (now = now_ns()) < deadline;) {
        tick_slow_readers(run, now, &slow_next);
        turn_take(run, now + SLOW_READ_INTERVAL_NS);
    }
}

struct usage {
    double server_s;
    double load_s;
    double busy_s;
    double wall_s;
};

static struct usage usage_now(const struct run *run) {
    return (struct usage){.server_s = server_cpu_seconds(&run->options),
                          .load_s = (double)clock_ns(CLOCK_PROCESS_CPUTIME_ID) / 1e9,
                          .busy_s = busy_cpu_seconds(),
                          .wall_s = (double)now_ns() / 1e9};
}

static void keep_usage_since(struct run *run, const struct usage *from) {
    struct usage now = usage_now(run);
    run->server_cpu_s = now.server_s - from->server_s;
    run->load_cpu_s = now.load_s - from->load_s;
    run->wall_s = now.wall_s - from->wall_s;
    double others = now.busy_s - from->busy_s - run->server_cpu_s - run->load_cpu_s;
    run->others_cpu_s = others > 0 ? others : 0;
}

static void connect_all(struct run *run) {
    mark("connecting");
    dial(run, true, &run->sub_connects);
    dial(run, false, &run->pub_connects);
    mark("connected");
}

static void publish_all(struct run *run) {
    struct usage from = usage_now(run);
    mark("publishing");
    publish(run);
    drain(run);
    keep_usage_since(run, &from);
}

int main(int argc, char **argv) {
    static struct run run;
    options_read(&run.options, argc, argv);
    raise_file_limit();
    /* Otherwise each wait may end 50 us late, and the schedule with it. */
    prctl(PR_SET_TIMERSLACK, 1);
    prepare(&run);
    struct usage from = usage_now(&run);
    connect_all(&run);
    /* Without publishers it is the connecting that is measured. */
    keep_usage_since(&run, &from);
    hold(&run);
    if (run.pub_connects.established) publish_all(&run);
    run.is_ending = true;
    mark("done");
    report_print(&run);
    return 0;
}
