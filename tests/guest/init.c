/*
 * The whole user space of the test guest: one static program, process 1 of an initramfs with nothing else in it.
 *
 * It loads the modules /m/0, /m/1, ..., takes its orders from the SMBIOS OEM strings that begin with "guest."
 * (`-smbios type=11,value=guest.mode=count`: the same on every way to boot, and nothing on the disk changes),
 * or failing that from the kernel's command line, does one workload, tells on the console what came of it and powers
 * off.
 *
 * A C program and not a shell: a record costs one write and one flush, not ten processes, so a guest under
 * emulation writes hundreds of records a second and boots without unpacking a busybox.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define EXTENT 65536
/* A line too many on a broken disk would only slow the end down: the counters at the end tell them all. */
#define REPORTS_MAX 20

static unsigned long io_errors, bad_reads;

/* One write a line, so that the kernel's own messages come between lines and not inside them. */
static void say(const char *format, ...)
{
    char line[512];
    va_list rest;
    va_start(rest, format);
    int length = vsnprintf(line, sizeof line - 1, format, rest);
    va_end(rest);
    if (length < 0)
        return;
    if (length > (int)sizeof line - 2)
        length = sizeof line - 2;
    line[length++] = '\n';
    if (write(1, line, length) != length)
        return;
}

static void io_error(const char *what, uint64_t offset)
{
    if (++io_errors <= REPORTS_MAX)
        say("IOERR %s at=%" PRIu64 " %s", what, offset, strerror(errno));
}

static void bad_read(const char *what, uint64_t number)
{
    if (++bad_reads <= REPORTS_MAX)
        say("BADREAD %s=%" PRIu64, what, number);
}

static _Noreturn void finish(void)
{
    say("GUEST-DONE ioerr=%lu badread=%lu", io_errors, bad_reads);
    /* Powering off does not wait for the line to leave the serial port. */
    tcdrain(1);
    reboot(RB_POWER_OFF);
    for (;;)
        pause();
}

/* ---- sha256 (FIPS 180-4) ---- */

static const uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static uint32_t rotate(uint32_t x, int by) { return x >> by | x << (32 - by); }

/* Of at most 119 bytes: all that is hashed here is a number and a name. */
static void sha256(const char *text, uint8_t digest[32])
{
    uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t padded[128] = {0};
    size_t length = strlen(text), whole = length < 56 ? 64 : 128;
    memcpy(padded, text, length);
    padded[length] = 0x80;
    padded[whole - 2] = length * 8 >> 8;
    padded[whole - 1] = length * 8;
    for (const uint8_t *p = padded; p < padded + whole; p += 64) {
        uint32_t w[64], s[8];
        for (int i = 0; i < 16; i++)
            w[i] = (uint32_t)p[4 * i] << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
        for (int i = 16; i < 64; i++) {
            uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] +
                   (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
        }
        memcpy(s, h, sizeof s);
        for (int i = 0; i < 64; i++) {
            uint32_t one = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) +
                           ((s[4] & s[5]) ^ (~s[4] & s[6])) + K[i] + w[i];
            uint32_t two = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) +
                           ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
            memmove(s + 1, s, 7 * sizeof *s);
            s[4] += one;
            s[0] = one + two;
        }
        for (int i = 0; i < 8; i++)
            h[i] += s[i];
    }
    for (int i = 0; i < 32; i++)
        digest[i] = h[i / 4] >> (24 - i % 4 * 8);
}

static void hex(const uint8_t digest[32], char text[65])
{
    for (int i = 0; i < 32; i++)
        sprintf(text + 2 * i, "%02x", digest[i]);
}

/* ---- orders ---- */

static char orders[4096];

static void add_order(const char *text)
{
    if (!strncmp(text, "guest.", 6) && strlen(orders) + strlen(text) < sizeof orders) {
        strcat(orders, text + 6);
        strcat(orders, "\n");
    }
}

/* The file's length; what comes after its content is zero. */
static ssize_t read_file(const char *path, void *to, size_t room)
{
    ssize_t length = 0, got;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    memset(to, 0, room);
    while (file >= 0 && (got = read(file, (char *)to + length, room - 2 - length)) > 0)
        length += got;
    if (file >= 0)
        close(file);
    return length;
}

/* The first to name an order wins: SMBIOS before the kernel's command line, in which a disk tells its own defaults. */
static void read_orders(void)
{
    static uint8_t table[65536];
    static char command_line[4096];
    /* A row of structures: type, length of the fixed part, handle, then strings, then an empty one. */
    ssize_t length = read_file("/sys/firmware/dmi/tables/DMI", table, sizeof table);
    for (ssize_t at = 0; at + 4 < length && table[at + 1] >= 4;) {
        int type = table[at];
        at += table[at + 1];
        do {
            const char *text = (const char *)table + at;
            at += strlen(text) + 1;
            if (type == 11)
                add_order(text);
        } while (at < length && table[at]);
        at++;
    }
    read_file("/proc/cmdline", command_line, sizeof command_line);
    for (char *word = strtok(command_line, " \n"); word; word = strtok(NULL, " \n"))
        add_order(word);
}

static const char *order(const char *name, const char *otherwise)
{
    static char values[16][64];
    static int used;
    size_t length = strlen(name);
    for (const char *line = orders; *line; line = strchr(line, '\n') + 1)
        if (!strncmp(line, name, length) && line[length] == '=') {
            char *value = values[used++ % 16];
            snprintf(value, sizeof *values, "%.*s", (int)strcspn(line + length + 1, "\n"), line + length + 1);
            return value;
        }
    return otherwise;
}

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *value = order(name, NULL);
    return value ? strtoull(value, NULL, 10) : otherwise;
}

/* ---- workloads ---- */

static const char *disk;
static uint64_t base, disk_bytes;

static int open_disk(int flags)
{
    int file = open(disk, flags | O_CLOEXEC);
    if (file < 0) {
        io_error("open", 0);
        finish();
    }
    return file;
}

/* An error may be a short write or a short read: beyond the end of the disk. */
static int put(int file, const void *from, size_t length, uint64_t offset)
{
    errno = EIO;
    return pwrite(file, from, length, offset) == (ssize_t)length ? 0 : -1;
}

static int get(int file, void *to, size_t length, uint64_t offset)
{
    errno = EIO;
    return pread(file, to, length, offset) == (ssize_t)length ? 0 : -1;
}

/* The first line of the area. */
static void boot_workload(void)
{
    char text[BLOCK + 1] = {0};
    if (get(open_disk(O_RDONLY), text, BLOCK, base)) {
        io_error("read", base);
        return;
    }
    text[strcspn(text, "\r\n")] = 0;
    say("BOOT-MARKER %.400s", text);
}

/* What belongs at an offset tells the offset, so data put in the wrong place is found as well as data lost. */
static void pattern(const char *seed, uint64_t offset, uint8_t *to, size_t length)
{
    for (size_t at = 0; at < length; at += BLOCK) {
        char text[100];
        snprintf(text, sizeof text, "%s %" PRIu64 "\n", seed, offset + at);
        sha256(text, to + at);
        for (size_t i = at + 32; i < at + BLOCK; i += 32)
            memcpy(to + i, to + at, 32);
    }
}

/* Buffered writes of a pattern, fsync, caches dropped, the same read back. */
static void rw_workload(void)
{
    static uint8_t wanted[EXTENT], found[EXTENT];
    const char *seed = order("seed", "seed");
    uint64_t extents = number("extents", 32), stride = number("stride", EXTENT);
    int file = open_disk(O_RDWR);
    for (uint64_t i = 0; i < extents; i++) {
        pattern(seed, base + i * stride, wanted, EXTENT);
        if (put(file, wanted, EXTENT, base + i * stride))
            io_error("write", base + i * stride);
    }
    if (fsync(file))
        io_error("fsync", 0);
    if (ioctl(file, BLKFLSBUF, 0))
        io_error("drop", 0);
    for (uint64_t i = 0; i < extents; i++) {
        pattern(seed, base + i * stride, wanted, EXTENT);
        if (get(file, found, EXTENT, base + i * stride))
            io_error("read", base + i * stride);
        else if (memcmp(wanted, found, EXTENT))
            bad_read("offset", base + i * stride);
    }
    if (!io_errors && !bad_reads)
        say("RW-OK extents=%" PRIu64, extents);
}

/* Record i: the line "REC i hash" over and over, where hash = sha256("i previous-hash"). */
static void record(uint64_t i, const uint8_t digest[32], char *to)
{
    char text[65], line[128];
    hex(digest, text);
    size_t length = snprintf(line, sizeof line, "REC %" PRIu64 " %s\n", i, text);
    for (size_t at = 0; at < BLOCK; at += length)
        memcpy(to + at, line, at + length < BLOCK ? length : BLOCK - at);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

/*
 * The hash chain: every record is on the disk (direct write, then a flush) before the next begins, so what the
 * console has told is what a disk must hold after any crash; every few records an earlier one is read again.
 */
static void count_workload(void)
{
    static char block[BLOCK] __attribute__((aligned(BLOCK))), wanted[BLOCK];
    uint64_t max = number("max", 600), every = number("every", 50), rate = number("rate", 0), random = 88172645463325252;
    uint8_t(*digests)[32] = calloc(max + 1, 32);
    char text[65];
    int file = open_disk(O_RDWR | O_DIRECT);
    if (!digests) {
        io_error("memory", 0);
        return;
    }
    snprintf(text, sizeof text, "%s", order("seed", "seed"));
    double started = now(), due = started;
    for (uint64_t i = 1; i <= max; i++) {
        char message[100];
        snprintf(message, sizeof message, "%" PRIu64 " %s\n", i, text);
        sha256(message, digests[i]);
        hex(digests[i], text);
        record(i, digests[i], block);
        if (put(file, block, BLOCK, base + i * BLOCK))
            io_error("write", base + i * BLOCK);
        else if (fsync(file))
            io_error("fsync", base + i * BLOCK);
        if (i % 4 == 0) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            uint64_t earlier = 1 + random % i;
            record(earlier, digests[earlier], wanted);
            if (get(file, block, BLOCK, base + earlier * BLOCK))
                io_error("read", base + earlier * BLOCK);
            else if (memcmp(block, wanted, BLOCK))
                bad_read("record", earlier);
        }
        if (i % every == 0)
            say("COUNT %" PRIu64 " %s", i, text);
        if (rate) {
            /* A guest that was held up does not hurry afterwards. */
            double pause = (due += 1.0 / rate) - now();
            if (pause > 0)
                usleep(pause * 1e6);
            else
                due = now();
        }
    }
    say("COUNT-DONE %" PRIu64 " %s seconds=%.2f", max, text, now() - started);
}

int main(void)
{
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mkdir("/dev", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int i = 0; i < 3; i++)
        dup2(console, i);
    for (int i = 0;; i++) {
        char path[16];
        snprintf(path, sizeof path, "/m/%d", i);
        int module = open(path, O_RDONLY | O_CLOEXEC);
        if (module < 0)
            break;
        if (syscall(SYS_finit_module, module, "", 0))
            say("module %d: %s", i, strerror(errno));
        close(module);
    }
    read_orders();
    char path[64];
    snprintf(path, sizeof path, "/dev/%s", order("disk", "vda"));
    disk = path;
    base = number("base", 0);
    for (int i = 0; i < 1000 && access(disk, F_OK); i++)
        usleep(10000);
    const char *mode = order("mode", "boot");
    struct timespec up;
    clock_gettime(CLOCK_BOOTTIME, &up);
    int file = open_disk(O_RDONLY);
    ioctl(file, BLKGETSIZE64, &disk_bytes);
    close(file);
    say("GUEST mode=%s disk=%s bytes=%" PRIu64 " up=%ld.%02ld", mode, disk, disk_bytes, (long)up.tv_sec,
        up.tv_nsec / 10000000);
    if (!strcmp(mode, "boot"))
        boot_workload();
    else if (!strcmp(mode, "rw"))
        rw_workload();
    else if (!strcmp(mode, "count"))
        count_workload();
    else
        say("IOERR no such mode: %s", mode), io_errors++;
    finish();
}
