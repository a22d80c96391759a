/*
 * SPDX-License-Identifier: Apache-2.0
 *
 * tgt_nbd: lets tgtd serve an NBD export as if it were a file.
 *
 * What. A library for LD_PRELOAD into a tgtd of our own. A logical unit whose backing store (bstype rdwr) is
 *
 *     nbd+unix:///EXPORT?socket=PATH                 an NBD URI (nothing in it may need percent-encoding)
 *     nbd+unix:///EXPORT?socket=PATH&unflushed=kept  the same, see «A daemon that died»
 *     …&size=BYTES                                   the same again; whoever set the path sees that it has grown since
 *
 * is read and written through the Unix socket at PATH; every other path and descriptor goes to libc untouched. Without
 * this library such a path is a file that does not exist, so nothing can go to the wrong place by mistake.
 *
 * Why. A qcow2 image can be written only by QEMU, so tgtd has to reach it through qemu-storage-daemon. Its FUSE export
 * serialises writes, cannot punch holes that are not cluster-aligned, and excludes an NBD export of the same image. A
 * backing store module of tgtd would have to know the layout of tgtd's private structures; the dozen libc calls that
 * its rdwr store makes are a stable interface.
 *
 * How. open() on such a path gives a number that is no kernel descriptor (FIRST_FD and up, never given twice in a row),
 * so one comparison tells ours from others and a late use of a closed one is EBADF, never somebody else's file. Each
 * call borrows a connection for one request and waits for its reply; connections are opened when all others are busy
 * and the one last used is taken first. Nothing is done over the network with the lock held.
 *
 * A daemon that died. Requests without a reply wait for the socket to answer again, at most TGT_NBD_RECONNECT seconds
 * (30) after it was lost, then fail with EIO; they are sent again as they were. A restarted daemon has forgotten what it
 * kept in memory: writes it acknowledged but was never told to flush may be gone (qcow2 writes its tables late). The
 * client must not hear that a later flush made them durable, so when such writes exist and another process answers, the
 * next flush on every descriptor of the export fails once with EIO, as fsync() does after a failed write-back.
 * «unflushed=kept» says that the daemon keeps nothing in memory, which is true of raw images: no flush fails then.
 *
 * Protocol: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle, simple replies) and
 * uri.md beside it. The daemon needs max-connections=0 or room for TGT_NBD_CONNECTIONS (16) for each export.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(off_t) == 8, "the plain and the 64-bit calls have to be the same");

#define EXPORTED __attribute__((visibility("default")))
#define ALIAS(of) __attribute__((visibility("default"), alias(#of), copy(of)))
#define NEXT(name) ({ static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name); next; })
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* ---- The protocol ---------------------------------------------------------------------------------------------- */

enum {
    FLAG_FIXED_NEWSTYLE = 1, FLAG_NO_ZEROES = 2,                        /* of the handshake, both sides alike */
    HAS_READ_ONLY = 1 << 1, HAS_FLUSH = 1 << 2, HAS_WRITE_ZEROES = 1 << 6, HAS_MULTI_CONN = 1 << 8, /* of an export */
    OPTION_GO = 7, REPLY_ACK = 1, REPLY_INFO = 3, INFO_EXPORT = 0,
    READ = 0, WRITE = 1, FLUSH = 3, WRITE_ZEROES = 6,
    NBD_ESHUTDOWN = 108,
};
#define NBD_MAGIC 0x4e42444d41474943ULL
#define OPTION_MAGIC 0x49484156454f5054ULL
#define OPTION_REPLY_MAGIC 0x0003e889045565a9ULL
#define REQUEST_MAGIC 0x25609513U
#define REPLY_MAGIC 0x67446698U
#define MAX_PAYLOAD (32U << 20)  /* every server takes this much */
#define MAX_ZEROES (1U << 30)

struct greeting { uint64_t magic, option_magic; uint16_t flags; } __attribute__((packed));
struct option { uint64_t magic; uint32_t option, length; } __attribute__((packed));
struct option_reply { uint64_t magic; uint32_t option, type, length; } __attribute__((packed));
struct export_info { uint16_t type; uint64_t size; uint16_t flags; } __attribute__((packed));
struct request { uint32_t magic; uint16_t flags, command; uint64_t cookie, offset; uint32_t length; } __attribute__((packed));
struct reply { uint32_t magic, error; uint64_t cookie; } __attribute__((packed));

/* ---- What is kept in memory ------------------------------------------------------------------------------------ */

struct connection {
    struct connection *next;
    int socket;
    unsigned generation;  /* which daemon is at the other end: volume.generation when it was opened */
};

struct process { pid_t pid; unsigned long long start; };

/* An export: one per URI, shared by the descriptors opened on it. */
struct volume {
    struct volume *next;
    char *uri, *export_name;
    struct sockaddr_un address;
    bool keeps_unflushed;
    unsigned descriptors, connections, limit, waiting;
    pthread_cond_t changed;         /* a connection is idle or gone, or a descriptor closed */
    struct connection *idle;
    struct process daemon;
    unsigned generation;            /* daemons seen */
    unsigned losses, losses_told;   /* how often unflushed writes were lost; what a new descriptor need not tell */
    uint64_t written, flushed;      /* writes acknowledged; how many of them a flush has covered */
    int64_t down_since;             /* 0 while it answers */
    uint16_t flags;                 /* of the export */
};

struct descriptor {
    struct volume *volume;
    int number;
    bool writable, closed;
    unsigned calls, losses_told;
    uint64_t size;
    int64_t last_call;
};

#define SLOTS 4096
#define FIRST_FD (1 << 30)
static struct descriptor *descriptors[SLOTS];
static struct volume *volumes;
static unsigned opened, reconnect_seconds, connection_limit;
/* One lock for all of the above: it is held for some instructions at a time, a request takes 100 times as long. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int64_t milliseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void wait_for_change(struct volume *volume, int64_t at_most)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += at_most * 1000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    volume->waiting++;
    pthread_cond_clockwait(&volume->changed, &lock, CLOCK_MONOTONIC, &until);
    volume->waiting--;
}

/* ---- Bytes on a socket ----------------------------------------------------------------------------------------- */

static bool advance(struct msghdr *message, size_t done)
{
    while (message->msg_iovlen && done >= message->msg_iov->iov_len) {
        done -= message->msg_iov->iov_len;
        message->msg_iov++;
        message->msg_iovlen--;
    }
    if (message->msg_iovlen) {
        message->msg_iov->iov_base = (char *)message->msg_iov->iov_base + done;
        message->msg_iov->iov_len -= done;
    }
    return message->msg_iovlen > 0;
}

static bool send_all(int socket, const void *head, size_t head_length, const void *body, size_t body_length)
{
    struct iovec parts[] = {{(void *)head, head_length}, {(void *)body, body_length}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = body_length ? 2 : 1};
    ssize_t sent;
    do {
        sent = sendmsg(socket, &message, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR)
            return false;
    } while (advance(&message, sent > 0 ? (size_t)sent : 0));
    return true;
}

static bool receive_all(int socket, void *data, size_t length)
{
    while (length) {
        ssize_t got = recv(socket, data, length, MSG_WAITALL);
        if (got == 0 || (got < 0 && errno != EINTR))
            return false;
        if (got > 0) {
            data = (char *)data + got;
            length -= (size_t)got;
        }
    }
    return true;
}

/* One request and its reply: 0 or the errno the server answers, -1 when the connection is of no more use. */
static int exchange(int socket, uint16_t command, void *data, uint32_t length, uint64_t offset)
{
    static uint64_t last_cookie;
    const uint64_t cookie = __atomic_add_fetch(&last_cookie, 1, __ATOMIC_RELAXED);
    const struct request request = {htobe32(REQUEST_MAGIC), 0, htobe16(command), cookie, htobe64(offset), htobe32(length)};
    struct reply reply;
    struct iovec parts[] = {{&reply, sizeof reply}, {data, length}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = command == READ ? 2 : 1};
    size_t received = 0;

    if (!send_all(socket, &request, sizeof request, data, command == WRITE ? length : 0))
        return -1;
    /* The data of a read mostly come with the reply; without them when it is an error. */
    while (received < sizeof reply) {
        ssize_t got = recvmsg(socket, &message, 0);
        if (got == 0 || (got < 0 && errno != EINTR))
            return -1;
        if (got > 0) {
            received += (size_t)got;
            advance(&message, (size_t)got);
        }
    }
    if (be32toh(reply.magic) != REPLY_MAGIC || reply.cookie != cookie || be32toh(reply.error) == NBD_ESHUTDOWN)
        return -1;
    if (reply.error)
        return received == sizeof reply ? (int)be32toh(reply.error) : -1; /* NBD's numbers are those of Linux */
    received -= sizeof reply;
    if (command == READ && !receive_all(socket, (char *)data + received, length - received))
        return -1;
    return 0;
}

/* ---- Connections ----------------------------------------------------------------------------------------------- */

/* Which process listens; one that cannot be told equals no other. */
static struct process peer_of(int socket)
{
    struct process process = {0, 0};
    struct ucred credentials;
    socklen_t length = sizeof credentials;
    char path[32], line[1024] = "";
    FILE *file;

    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0 || credentials.pid <= 0)
        return process;
    snprintf(path, sizeof path, "/proc/%d/stat", credentials.pid);
    if ((file = fopen(path, "re")) != NULL) {
        const char *word = fgets(line, sizeof line, file) ? strrchr(line, ')') : NULL;
        for (int field = 3; word && field <= 22; field++)
            word = strchr(word + 1, ' ');
        if (word && sscanf(word, "%llu", &process.start) == 1)
            process.pid = credentials.pid;
        fclose(file);
    }
    return process;
}

/* The handshake: 0 or an errno. */
static int shake_hands(int socket, const char *name, uint64_t *size, uint16_t *flags)
{
    const uint32_t name_length = (uint32_t)strlen(name);
    const uint32_t answer = htobe32(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES), length = htobe32(name_length);
    const uint16_t no_requests = 0;
    const struct option option = {htobe64(OPTION_MAGIC), htobe32(OPTION_GO), htobe32(name_length + 6)};
    struct greeting greeting;
    struct option_reply reply;
    char data[4096];

    if (!receive_all(socket, &greeting, sizeof greeting))
        return EIO;
    if (be64toh(greeting.magic) != NBD_MAGIC || be64toh(greeting.option_magic) != OPTION_MAGIC ||
        (be16toh(greeting.flags) & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)) != (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
        return EPROTO;
    if (!send_all(socket, &answer, sizeof answer, &option, sizeof option) ||
        !send_all(socket, &length, sizeof length, name, name_length) ||
        !send_all(socket, &no_requests, sizeof no_requests, NULL, 0))
        return EIO;
    for (*flags = 0;;) {
        struct export_info info;
        if (!receive_all(socket, &reply, sizeof reply))
            return EIO;
        const uint32_t type = be32toh(reply.type), data_length = be32toh(reply.length);
        if (be64toh(reply.magic) != OPTION_REPLY_MAGIC || data_length > sizeof data)
            return EPROTO;
        if (!receive_all(socket, data, data_length))
            return EIO;
        if (type == REPLY_ACK)
            return *flags & 1 ? 0 : EPROTO; /* bit 0 is set in the flags of every export */
        if (type != REPLY_INFO)
            return ENOENT; /* it refuses; mostly because it has no such export (any more) */
        memcpy(&info, data, MIN(sizeof info, data_length));
        if (data_length >= sizeof info && be16toh(info.type) == INFO_EXPORT) {
            *size = be64toh(info.size);
            *flags = be16toh(info.flags);
        }
    }
}

/* A new socket that is ready for requests; negative with errno. Called without the lock. */
static int dial(const struct volume *volume, int seconds, uint64_t *size, uint16_t *flags)
{
    struct timeval limit = {seconds, 0};
    int error = 0, fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return -1;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    if (connect(fd, (const struct sockaddr *)&volume->address, sizeof volume->address) != 0)
        error = errno;
    else
        error = shake_hands(fd, volume->export_name, size, flags);
    if (error) {
        close(fd);
        errno = error;
        return -1;
    }
    limit.tv_sec = 0;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    return fd;
}

/* Takes note of who is at the other end of a new connection, and of what was lost if it is somebody else. */
static struct connection *adopt(struct volume *volume, int socket, struct process peer)
{
    struct connection *connection = malloc(sizeof *connection);
    const bool same = peer.pid && peer.pid == volume->daemon.pid && peer.start == volume->daemon.start;

    if (!connection)
        return NULL;
    if (!same) {
        if (volume->written > volume->flushed && !volume->keeps_unflushed) {
            volume->losses++;
            fprintf(stderr, "tgt_nbd: %s: another daemon answers; unflushed writes may be lost, the next flush fails\n",
                    volume->uri);
        }
        volume->flushed = volume->written;
        volume->daemon = peer;
        volume->generation++;
    }
    if (volume->down_since)
        fprintf(stderr, "tgt_nbd: %s: answers again after %lld ms\n", volume->uri,
                (long long)(milliseconds() - volume->down_since));
    volume->down_since = 0;
    *connection = (struct connection){.socket = socket, .generation = volume->generation};
    return connection;
}

static void discard(struct volume *volume, struct connection *connection)
{
    close(connection->socket);
    free(connection);
    volume->connections--;
}

static void discard_idle(struct volume *volume)
{
    for (struct connection *next, *connection = volume->idle; connection; connection = next) {
        next = connection->next;
        discard(volume, connection);
    }
    volume->idle = NULL;
}

/* A connection for one request; with the lock held. NULL with errno when there is none in time. */
static struct connection *borrow(struct descriptor *descriptor)
{
    struct volume *volume = descriptor->volume;
    struct connection *connection;

    while (!descriptor->closed) {
        if ((connection = volume->idle) != NULL) {
            volume->idle = connection->next;
            return connection;
        }
        if (volume->connections >= volume->limit) {
            wait_for_change(volume, 500);
            continue;
        }
        volume->connections++;
        pthread_mutex_unlock(&lock);
        uint64_t size;
        uint16_t flags;
        int fd = dial(volume, 5, &size, &flags);
        struct process peer = {0, 0};
        if (fd >= 0)
            peer = peer_of(fd);
        pthread_mutex_lock(&lock);
        if (fd >= 0 && volume->flags & ~flags & (HAS_FLUSH | HAS_MULTI_CONN)) {
            close(fd); /* flushes would not do any more what open_export() relied on */
            fd = -1;
            errno = EPROTO;
        }
        if (fd >= 0 && (connection = adopt(volume, fd, peer)) != NULL)
            return connection;
        if (fd >= 0)
            close(fd);
        volume->connections--;
        const int64_t now = milliseconds();
        if (!volume->down_since) {
            volume->down_since = now;
            fprintf(stderr, "tgt_nbd: %s: does not answer (%m), trying for %u s\n", volume->uri, reconnect_seconds);
        }
        if (now - volume->down_since >= reconnect_seconds * 1000LL)
            break;
        wait_for_change(volume, 50);
    }
    errno = EIO;
    return NULL;
}

/* Does one request, however many connections it takes: 0, or -1 with errno. */
static int perform(struct descriptor *descriptor, uint16_t command, void *data, uint32_t length, uint64_t offset)
{
    struct volume *volume = descriptor->volume;
    int64_t first_loss = 0;
    int error = -1;

    pthread_mutex_lock(&lock);
    while (error < 0) {
        struct connection *connection = borrow(descriptor);
        if (!connection) {
            error = errno;
            break;
        }
        const uint64_t covered = volume->written;
        if (command == FLUSH && descriptor->losses_told != volume->losses) {
            descriptor->losses_told = volume->losses_told = volume->losses;
            error = EIO;
        } else {
            pthread_mutex_unlock(&lock);
            error = exchange(connection->socket, command, data, length, offset);
            pthread_mutex_lock(&lock);
            /* A reply of a daemon that another one has replaced meanwhile says nothing about what that one has. */
            if (connection->generation != volume->generation)
                error = -1;
        }
        if (error < 0) {
            discard(volume, connection);
            discard_idle(volume); /* to the same daemon */
            if (!first_loss)
                first_loss = milliseconds();
            else if (milliseconds() - first_loss < reconnect_seconds * 1000LL)
                wait_for_change(volume, 50);
            else
                error = EIO; /* perhaps it is this very request that the daemon dies of */
        } else {
            connection->next = volume->idle;
            volume->idle = connection;
        }
        if (volume->waiting)
            pthread_cond_broadcast(&volume->changed);
        if (error == 0 && command == FLUSH && covered > volume->flushed)
            volume->flushed = covered;
        if (error == 0 && (command == WRITE || command == WRITE_ZEROES))
            volume->written++;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return error ? -1 : 0;
}

/* ---- Volumes and descriptors ----------------------------------------------------------------------------------- */

#define URI_START "nbd+unix:///"

static void free_volume(struct volume *volume)
{
    free(volume->uri);
    free(volume->export_name);
    free(volume);
}

/* NULL with errno when it is not a URI that this library understands in full. */
static struct volume *parse(const char *uri)
{
    struct volume *volume = calloc(1, sizeof *volume);
    char *query, *word;

    if (!volume || !(volume->uri = strdup(uri)) || !(volume->export_name = strdup(uri + strlen(URI_START)))) {
        errno = ENOMEM;
        goto failed;
    }
    errno = EINVAL;
    if (strchr(uri, '%'))
        goto failed;
    query = volume->export_name;
    strsep(&query, "?");
    while ((word = strsep(&query, "&")) != NULL) {
        if (strncmp(word, "socket=", 7) == 0) {
            if (strlen(word + 7) >= sizeof volume->address.sun_path) {
                errno = ENAMETOOLONG;
                goto failed;
            }
            strcpy(volume->address.sun_path, word + 7);
        } else if (strcmp(word, "unflushed=kept") == 0) {
            volume->keeps_unflushed = true;
        } else {
            goto failed;
        }
    }
    if (!volume->address.sun_path[0])
        goto failed;
    volume->address.sun_family = AF_UNIX;
    pthread_cond_init(&volume->changed, NULL);
    return volume;
failed:
    if (volume)
        free_volume(volume);
    return NULL;
}

/* The volume of a URI, made when it is new. With the lock held. */
static struct volume *volume_of(const char *uri)
{
    struct volume *volume;

    for (volume = volumes; volume; volume = volume->next)
        if (strcmp(volume->uri, uri) == 0)
            return volume;
    if ((volume = parse(uri)) != NULL) {
        volume->next = volumes;
        volumes = volume;
    }
    return volume;
}

/* One with something left to tell is kept for whoever opens it again. */
static void release(struct volume *volume)
{
    struct volume **link = &volumes;

    if (--volume->descriptors > 0)
        return;
    discard_idle(volume);
    if (volume->written > volume->flushed || volume->losses_told != volume->losses)
        return;
    while (*link != volume)
        link = &(*link)->next;
    *link = volume->next;
    free_volume(volume);
}

static unsigned setting(const char *name, unsigned otherwise)
{
    const char *value = getenv(name);
    return value && *value ? (unsigned)strtoul(value, NULL, 10) : otherwise;
}

static int open_export(const char *uri, int flags)
{
    struct descriptor *descriptor = NULL;
    struct connection *connection = NULL;
    struct process peer = {0, 0};
    uint64_t size;
    uint16_t export_flags;
    unsigned slot;
    int fd, error = 0, number = -1;

    if (flags & (O_SYNC | O_DSYNC | O_CREAT | O_TRUNC)) {
        errno = EINVAL;
        return -1;
    }
    pthread_mutex_lock(&lock);
    if (!connection_limit) {
        reconnect_seconds = setting("TGT_NBD_RECONNECT", 30);
        connection_limit = setting("TGT_NBD_CONNECTIONS", 16);
        connection_limit += !connection_limit;
    }
    /* A volume that has grown is still the same one: what is known of its unflushed writes goes on. */
    const char *size_word = strstr(uri, "&size=");
    char *identity = strndup(uri, size_word ? (size_t)(size_word - uri) : strlen(uri));
    struct volume *volume = identity ? volume_of(identity) : NULL;
    free(identity);
    if (!volume) {
        pthread_mutex_unlock(&lock);
        return -1;
    }
    volume->descriptors++;
    volume->connections++;
    pthread_mutex_unlock(&lock);
    /* One attempt only: tgtd opens in the thread that serves all its connections. */
    if ((fd = dial(volume, 2, &size, &export_flags)) < 0)
        error = errno;
    else
        peer = peer_of(fd);
    pthread_mutex_lock(&lock);
    for (slot = 0; slot < SLOTS && descriptors[slot];)
        slot++;
    if (!error && flags & O_ACCMODE && export_flags & HAS_READ_ONLY)
        error = EROFS; /* tgtd tries again, read-only */
    else if (!error && flags & O_ACCMODE && !(export_flags & HAS_FLUSH))
        error = EOPNOTSUPP; /* nothing would ever be durable */
    else if (!error && slot == SLOTS)
        error = EMFILE;
    else if (!error && ((descriptor = calloc(1, sizeof *descriptor)) == NULL ||
                        (connection = adopt(volume, fd, peer)) == NULL))
        error = ENOMEM;
    if (!error) {
        number = FIRST_FD + (int)(opened++ % (FIRST_FD / SLOTS) * SLOTS + slot);
        volume->flags = export_flags;
        /* Without the promise of MULTI_CONN a flush covers the writes of its own connection only. */
        volume->limit = export_flags & HAS_MULTI_CONN && peer.pid ? connection_limit : 1;
        connection->next = volume->idle;
        volume->idle = connection;
        *descriptor = (struct descriptor){.volume = volume, .number = number, .writable = (flags & O_ACCMODE) != O_RDONLY,
                                          .losses_told = volume->losses_told, .size = size};
        descriptors[slot] = descriptor;
    } else {
        if (fd >= 0)
            close(fd);
        free(descriptor);
        volume->connections--;
        release(volume);
    }
    pthread_mutex_unlock(&lock);
    if (error)
        errno = error;
    return number;
}

/* The open descriptor of that number, kept until leave(); NULL with EBADF. Threads of tgtd are ended by pthread_cancel:
 * not in here, where they hold a lock or a connection. */
static struct descriptor *enter(int number, int *cancel_state)
{
    pthread_mutex_lock(&lock);
    struct descriptor *descriptor = descriptors[(unsigned)number % SLOTS];
    if (descriptor && descriptor->number == number)
        descriptor->calls++;
    else
        descriptor = NULL;
    pthread_mutex_unlock(&lock);
    if (descriptor)
        pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, cancel_state);
    else
        errno = EBADF;
    return descriptor;
}

static void leave(struct descriptor *descriptor, int cancel_state)
{
    const int error = errno;
    pthread_mutex_lock(&lock);
    descriptor->last_call = milliseconds();
    if (--descriptor->calls == 0 && descriptor->closed) {
        release(descriptor->volume);
        free(descriptor);
    }
    pthread_mutex_unlock(&lock);
    pthread_setcancelstate(cancel_state, NULL);
    errno = error;
}

/*
 * tgtd changes a path by close() and open() in its main thread, while the worker threads still have commands; these
 * read the descriptor when they start, and find 0 in between. So close() lets all that is queued start and end first:
 * it waits, 2 s at most, until nothing has been under way for 5 ms. (No new commands come in: they come from this thread.)
 */
#define QUIET_MS 5
#define LONGEST_DRAIN_MS 2000
static const struct timespec pause_1ms = {0, 1000000};

static int close_export(int number)
{
    int cancel_state;
    struct descriptor *descriptor = enter(number, &cancel_state);

    if (!descriptor)
        return -1;
    pthread_mutex_lock(&lock);
    for (const int64_t start = milliseconds(); milliseconds() < start + LONGEST_DRAIN_MS;) {
        if (descriptor->calls == 1 && milliseconds() > descriptor->last_call + QUIET_MS)
            break;
        pthread_mutex_unlock(&lock);
        nanosleep(&pause_1ms, NULL);
        pthread_mutex_lock(&lock);
    }
    descriptor->closed = true;
    descriptors[(unsigned)number % SLOTS] = NULL;
    struct volume *volume = descriptor->volume;
    if (descriptor->losses_told < volume->losses_told)
        volume->losses_told = descriptor->losses_told;
    pthread_cond_broadcast(&volume->changed);
    pthread_mutex_unlock(&lock);
    leave(descriptor, cancel_state);
    return 0;
}

/* Any length, in pieces that a server takes. All of it or an error. */
static int transfer(int number, uint16_t command, void *data, uint64_t length, off_t offset)
{
    const uint32_t piece = command == WRITE_ZEROES ? MAX_ZEROES : MAX_PAYLOAD;
    int cancel_state, result = 0;
    struct descriptor *descriptor = enter(number, &cancel_state);

    if (!descriptor)
        return -1;
    if (command != READ && !descriptor->writable) {
        errno = EBADF;
        result = -1;
    } else if (command == WRITE_ZEROES && !(descriptor->volume->flags & HAS_WRITE_ZEROES)) {
        errno = EOPNOTSUPP;
        result = -1;
    }
    for (uint64_t done = 0; done < length && result == 0; done += piece)
        result = perform(descriptor, command, (char *)data + done, (uint32_t)MIN(piece, length - done), (uint64_t)offset + done);
    leave(descriptor, cancel_state);
    return result;
}

static int flush(int number)
{
    int cancel_state, result = 0;
    struct descriptor *descriptor = enter(number, &cancel_state);

    if (!descriptor)
        return -1;
    if (descriptor->writable)
        result = perform(descriptor, FLUSH, NULL, 0, 0);
    leave(descriptor, cancel_state);
    return result;
}

static int64_t size_of(int number)
{
    int cancel_state;
    struct descriptor *descriptor = enter(number, &cancel_state);

    if (!descriptor)
        return -1;
    const int64_t size = (int64_t)descriptor->size;
    leave(descriptor, cancel_state);
    return size;
}

/*
 * The same for a plain file, which tgtd serves without our help: a raw image that grows gets a new path too. Numbers and
 * times of calls are kept for descriptors that can be LUNs; the calls go to libc.
 */
static struct { _Atomic int calls; _Atomic int64_t last_call; } plain[SLOTS];

static void begin_plain(int fd)
{
    if (fd >= 0 && fd < SLOTS)
        plain[fd].calls++;
}

static void end_plain(int fd)
{
    if (fd >= 0 && fd < SLOTS) {
        plain[fd].last_call = milliseconds();
        plain[fd].calls--;
    }
}

#define PLAIN(call) ({ begin_plain(fd); __typeof__(call) result = call; end_plain(fd); result; })

static int close_plain(int fd)
{
    if (fd >= 0 && fd < SLOTS && plain[fd].last_call) {
        for (const int64_t start = milliseconds(); milliseconds() < start + LONGEST_DRAIN_MS; nanosleep(&pause_1ms, NULL))
            if (plain[fd].calls == 0 && milliseconds() > plain[fd].last_call + QUIET_MS)
                break;
        plain[fd].last_call = 0;
    }
    return NEXT(close)(fd);
}

/* ---- The calls of libc that tgtd makes ------------------------------------------------------------------------- */

static int open_any(const char *path, int flags, mode_t mode)
{
    return strncmp(path, URI_START, strlen(URI_START)) == 0 ? open_export(path, flags) : NEXT(open)(path, flags, mode);
}

EXPORTED int open(const char *path, int flags, ...)
{
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list more;
        va_start(more, flags);
        mode = va_arg(more, mode_t);
        va_end(more);
    }
    return open_any(path, flags, mode);
}
int open64(const char *path, int flags, ...) ALIAS(open);

EXPORTED int __open_2(const char *path, int flags);
int __open_2(const char *path, int flags)
{
    return open_any(path, flags, 0);
}
int __open64_2(const char *path, int flags) ALIAS(__open_2);

EXPORTED int close(int fd)
{
    return fd < FIRST_FD ? close_plain(fd) : close_export(fd);
}

EXPORTED ssize_t pread(int fd, void *data, size_t length, off_t offset)
{
    if (fd < FIRST_FD)
        return PLAIN(NEXT(pread)(fd, data, length, offset));
    return transfer(fd, READ, data, length, offset) ? -1 : (ssize_t)length;
}
ssize_t pread64(int fd, void *data, size_t length, off64_t offset) ALIAS(pread);

EXPORTED ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    if (fd < FIRST_FD)
        return PLAIN(NEXT(pwrite)(fd, data, length, offset));
    return transfer(fd, WRITE, (void *)data, length, offset) ? -1 : (ssize_t)length;
}
ssize_t pwrite64(int fd, const void *data, size_t length, off64_t offset) ALIAS(pwrite);

EXPORTED int fdatasync(int fd)
{
    return fd < FIRST_FD ? PLAIN(NEXT(fdatasync)(fd)) : flush(fd);
}

EXPORTED int fsync(int fd)
{
    return fd < FIRST_FD ? NEXT(fsync)(fd) : flush(fd);
}

/* Zeros that read back as zeros, with or without a hole: NBD_CMD_TRIM would not promise that. */
EXPORTED int fallocate(int fd, int mode, off_t offset, off_t length)
{
    if (fd < FIRST_FD)
        return PLAIN(NEXT(fallocate)(fd, mode, offset, length));
    if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) || (mode & ~FALLOC_FL_KEEP_SIZE) == FALLOC_FL_ZERO_RANGE)
        return transfer(fd, WRITE_ZEROES, NULL, (uint64_t)length, offset);
    errno = EOPNOTSUPP;
    return -1;
}
int fallocate64(int fd, int mode, off64_t offset, off64_t length) ALIAS(fallocate);

EXPORTED int posix_fadvise(int fd, off_t offset, off_t length, int advice)
{
    return fd < FIRST_FD ? NEXT(posix_fadvise)(fd, offset, length, advice) : 0;
}
int posix_fadvise64(int fd, off64_t offset, off64_t length, int advice) ALIAS(posix_fadvise);

/* Only what GET LBA STATUS asks: all of it is data. */
EXPORTED off_t lseek(int fd, off_t offset, int whence)
{
    if (fd < FIRST_FD)
        return NEXT(lseek)(fd, offset, whence);
    const int64_t size = size_of(fd);
    if (size < 0)
        return -1;
    if ((whence == SEEK_DATA || whence == SEEK_HOLE) && offset >= 0 && offset < size)
        return whence == SEEK_DATA ? offset : size;
    errno = whence == SEEK_DATA || whence == SEEK_HOLE ? ENXIO : EINVAL;
    return -1;
}
off64_t lseek64(int fd, off64_t offset, int whence) ALIAS(lseek);

EXPORTED int fstat(int fd, struct stat *status)
{
    if (fd < FIRST_FD)
        return NEXT(fstat)(fd, status);
    const int64_t size = size_of(fd);
    if (size < 0)
        return -1;
    *status = (struct stat){.st_mode = S_IFREG | 0600, .st_nlink = 1, .st_size = size, .st_blksize = 4096,
                            .st_blocks = size / 512};
    return 0;
}

_Static_assert(sizeof(struct stat) == sizeof(struct stat64), "the plain and the 64-bit calls have to be the same");
EXPORTED int fstat64(int fd, struct stat64 *status)
{
    return fstat(fd, (struct stat *)status);
}
