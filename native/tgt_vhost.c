/*
 * SPDX-License-Identifier: Apache-2.0
 *
 * tgt_vhost: lets tgtd serve a vhost-user-blk export of qemu-storage-daemon as if it were a file.
 *
 * What. A library for LD_PRELOAD into a tgtd of our own. A logical unit whose backing store (bstype rdwr) is
 *
 *     vhost-user-blk:///NAME?socket=PATH                 (nothing in it may need percent-encoding)
 *     vhost-user-blk:///NAME?socket=PATH&unflushed=kept  the same, see «A daemon that died»
 *     …&size=BYTES                                       the same again; whoever set the path sees that it has grown since
 *
 * is read and written through the Unix socket at PATH; every other path and descriptor goes to libc untouched. Without
 * this library such a path is a file that does not exist, so nothing can go to the wrong place by mistake. NAME is for
 * people who look at what tgtd has open.
 *
 * Why. A qcow2 image can be written only by QEMU, so tgtd has to reach it through qemu-storage-daemon. Its FUSE export
 * serialises writes, cannot punch holes that are not cluster-aligned, and copies all data twice more; an NBD export
 * copies them as often and takes twice the system calls. A backing store module of tgtd would have to know the layout of
 * tgtd's private structures; the dozen libc calls that its rdwr store makes are a stable interface.
 *
 * How. open() on such a path gives a number that is no kernel descriptor (FIRST_FD and up, never given twice in a row),
 * so one comparison tells ours from others and a late use of a closed one is EBADF, never somebody else's file. Each
 * call borrows a lane (vhost_blk.h) for one request and waits for its completion; the lane last used is taken first, so
 * that no more memory is touched than there are requests at once. Nothing is done on a socket with the lock held.
 *
 * A daemon that died. Requests that were not completed wait for the socket to answer again, at most TGT_VHOST_RECONNECT
 * seconds (30) after it was lost, then fail with EIO; they are sent again as they were. A restarted daemon has forgotten
 * what it kept in memory: writes it acknowledged but was never told to flush may be gone (qcow2 writes its tables late).
 * The client must not hear that a later flush made them durable, so when such writes exist and another process answers,
 * the next flush on every descriptor of the export fails once with EIO, as fsync() does after a failed write-back.
 * «unflushed=kept» says that the daemon keeps nothing in memory, which is true of raw images: no flush fails then.
 *
 * The daemon serves one client at a time: every URI needs an export of its own, with as many queues as tgtd has threads
 * for a unit (TGT_VHOST_LANES, 16).
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

#include "vhost_blk.h"

_Static_assert(sizeof(off_t) == 8, "the plain and the 64-bit calls have to be the same");

#define EXPORTED __attribute__((visibility("default")))
#define ALIAS(of) __attribute__((visibility("default"), alias(#of), copy(of)))
#define NEXT(name) ({ static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name); next; })
#define MIN(a, b) ((a) < (b) ? (a) : (b))

/* ---- What is kept in memory ------------------------------------------------------------------------------------ */

struct process { pid_t pid; unsigned long long start; };

/* A lane that is idle, or borrowed for one request. */
struct connection {
    struct connection *next;
    struct vhost_lane *lane;
    unsigned generation;            /* which daemon is at the other end: volume.generation when it was opened */
};

/* A new session: all its lanes, and what is at the other end. */
struct session {
    struct connection *connections;
    struct vhost_server server;
    struct process process;
};

/* An export: one per URI, shared by the descriptors opened on it. */
struct volume {
    struct volume *next;
    char *uri;
    struct sockaddr_un address;
    bool keeps_unflushed;
    unsigned descriptors, connections, waiting;
    pthread_rwlock_t writes;        /* held by every write; alone by one of a part of a sector */
    pthread_cond_t changed;         /* a connection is idle or gone, or a descriptor closed */
    struct connection *idle;
    struct vhost_server server;     /* as it was when it was last connected to */
    struct process daemon;
    unsigned generation;            /* daemons seen */
    unsigned losses, losses_told;   /* how often unflushed writes were lost; what a new descriptor need not tell */
    uint64_t written, flushed;      /* writes acknowledged; how many of them a flush has covered */
    int64_t down_since;             /* 0 while it answers */
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
static unsigned opened, reconnect_seconds, lanes;
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

/* ---- Sessions and their lanes ----------------------------------------------------------------------------------- */

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

static void hang_up(struct connection *connection)
{
    vhost_close(connection->lane);
    free(connection);
}

/* The end of a session that was not adopted. */
static void drop(struct session *session)
{
    for (struct connection *next, *connection = session->connections; connection; connection = next) {
        next = connection->next;
        hang_up(connection);
    }
}

/* A session that is ready for requests: 0 or an errno. Called without the lock. */
static int dial(const struct volume *volume, int seconds, struct session *session)
{
    struct vhost_lane *first;
    int error;

    *session = (struct session){0};
    if ((error = vhost_connect(&volume->address, lanes, seconds, &first, &session->server)) != 0)
        return error;
    session->process = peer_of(session->server.socket);
    const unsigned count = session->server.lanes;
    for (unsigned number = 0; number < count; number++) {
        struct connection *connection = malloc(sizeof *connection);
        if (!connection) {
            vhost_close(vhost_lane(first, number)); /* it goes on with fewer */
            session->server.lanes--;
            continue;
        }
        *connection = (struct connection){.next = session->connections, .lane = vhost_lane(first, number)};
        session->connections = connection;
    }
    return session->connections ? 0 : ENOMEM;
}

/* Takes note of who is at the other end of a new session, and of what was lost if it is somebody else. */
static void adopt(struct volume *volume, struct session *session)
{
    const struct process *peer = &session->process;
    const bool same = peer->pid && peer->pid == volume->daemon.pid && peer->start == volume->daemon.start;

    if (!same) {
        if (volume->written > volume->flushed && !volume->keeps_unflushed) {
            volume->losses++;
            fprintf(stderr, "tgt_vhost: %s: another daemon answers; unflushed writes may be lost, the next flush fails\n",
                    volume->uri);
        }
        volume->flushed = volume->written;
        volume->daemon = *peer;
        volume->generation++;
    }
    if (volume->down_since)
        fprintf(stderr, "tgt_vhost: %s: answers again after %lld ms\n", volume->uri,
                (long long)(milliseconds() - volume->down_since));
    volume->down_since = 0;
    volume->server = session->server;
    volume->connections = session->server.lanes;
    for (struct connection *next, *connection = session->connections; connection; connection = next) {
        next = connection->next;
        connection->generation = volume->generation;
        connection->next = volume->idle;
        volume->idle = connection;
    }
    if (volume->waiting)
        pthread_cond_broadcast(&volume->changed);
}

static void discard(struct volume *volume, struct connection *connection)
{
    hang_up(connection);
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
        /* The daemon takes one client: the next session begins when every lane of the last one is given up. */
        if (volume->connections) {
            wait_for_change(volume, 500);
            continue;
        }
        struct session session;
        volume->connections = 1; /* nobody else dials */
        pthread_mutex_unlock(&lock);
        int error = dial(volume, 5, &session);
        pthread_mutex_lock(&lock);
        if (!error && volume->server.flushes && !session.server.flushes) {
            drop(&session); /* it would not do any more what open_export() relied on */
            error = EPROTO;
        }
        if (!error) {
            adopt(volume, &session);
            continue;
        }
        volume->connections = 0;
        errno = error;
        const int64_t now = milliseconds();
        if (!volume->down_since) {
            volume->down_since = now;
            fprintf(stderr, "tgt_vhost: %s: does not answer (%m), trying for %u s\n", volume->uri, reconnect_seconds);
        }
        if (now - volume->down_since >= reconnect_seconds * 1000LL)
            break;
        wait_for_change(volume, 50);
    }
    errno = EIO;
    return NULL;
}

/* Does one request, however many connections it takes: 0, or -1 with errno. */
static int perform(struct descriptor *descriptor, enum vhost_request request, void *data, uint32_t length, uint64_t offset)
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
        if (request == VHOST_FLUSH && descriptor->losses_told != volume->losses) {
            descriptor->losses_told = volume->losses_told = volume->losses;
            error = EIO;
        } else {
            pthread_mutex_unlock(&lock);
            error = vhost_exchange(connection->lane, request, data, length, offset);
            pthread_mutex_lock(&lock);
            /* A reply of a daemon that another one has replaced meanwhile says nothing about what that one has. */
            if (connection->generation != volume->generation)
                error = -1;
        }
        if (error < 0) {
            discard(volume, connection);
            discard_idle(volume); /* they are of the same session */
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
        if (error == 0 && request == VHOST_FLUSH && covered > volume->flushed)
            volume->flushed = covered;
        if (error == 0 && (request == VHOST_WRITE || request == VHOST_WRITE_ZEROES))
            volume->written++;
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return error ? -1 : 0;
}

/* ---- Volumes and descriptors ----------------------------------------------------------------------------------- */

#define URI_START "vhost-user-blk:///"

static void free_volume(struct volume *volume)
{
    free(volume->uri);
    free(volume);
}

/* NULL with errno when it is not a URI that this library understands in full. */
static struct volume *parse(const char *uri)
{
    struct volume *volume = calloc(1, sizeof *volume);
    char *words = strdup(uri), *query = words, *word;

    if (!volume || !words || !(volume->uri = strdup(uri))) {
        errno = ENOMEM;
        goto failed;
    }
    errno = EINVAL;
    if (strchr(uri, '%'))
        goto failed;
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
    pthread_rwlockattr_t fair; /* by default one who wants it alone may wait for as long as there are others */
    pthread_rwlockattr_init(&fair);
    pthread_rwlockattr_setkind_np(&fair, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&volume->writes, &fair);
    pthread_rwlockattr_destroy(&fair);
    free(words);
    return volume;
failed:
    free(words);
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

/* Whether there are lanes, and not of a session whose end nobody has noticed yet; with the lock held. */
static bool has_session(struct volume *volume)
{
    for (const int64_t start = milliseconds(); volume->connections && milliseconds() < start + 2000;) {
        if (!volume->idle)
            wait_for_change(volume, 50);
        else if (vhost_lives(volume->idle->lane))
            break;
        else
            discard_idle(volume);
    }
    return volume->connections > 0;
}

static int open_export(const char *uri, int flags)
{
    struct descriptor *descriptor = NULL;
    struct session session = {0};
    unsigned slot;
    int error = 0, number = -1;

    if (flags & (O_SYNC | O_DSYNC | O_CREAT | O_TRUNC)) {
        errno = EINVAL;
        return -1;
    }
    pthread_mutex_lock(&lock);
    if (!lanes) {
        reconnect_seconds = setting("TGT_VHOST_RECONNECT", 30);
        lanes = setting("TGT_VHOST_LANES", 16);
        lanes += !lanes;
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
    const bool is_connected = has_session(volume);
    if (!is_connected) {
        volume->connections = 1;
        pthread_mutex_unlock(&lock);
        /* One attempt only: tgtd opens in the thread that serves all its connections. */
        error = dial(volume, 2, &session);
        pthread_mutex_lock(&lock);
    }
    const struct vhost_server *server = is_connected ? &volume->server : &session.server;
    for (slot = 0; slot < SLOTS && descriptors[slot];)
        slot++;
    if (!error && flags & O_ACCMODE && server->read_only)
        error = EROFS; /* tgtd tries again, read-only */
    else if (!error && flags & O_ACCMODE && !server->flushes)
        error = EOPNOTSUPP; /* nothing would ever be durable */
    else if (!error && slot == SLOTS)
        error = EMFILE;
    else if (!error && (descriptor = calloc(1, sizeof *descriptor)) == NULL)
        error = ENOMEM;
    if (!error) {
        number = FIRST_FD + (int)(opened++ % (FIRST_FD / SLOTS) * SLOTS + slot);
        if (!is_connected)
            adopt(volume, &session);
        *descriptor = (struct descriptor){.volume = volume, .number = number, .writable = (flags & O_ACCMODE) != O_RDONLY,
                                          .losses_told = volume->losses_told, .size = volume->server.size};
        /* A session that goes on, as requests of another descriptor hang in it, may be older than the growth. */
        if (is_connected && size_word)
            descriptor->size = strtoull(size_word + strlen("&size="), NULL, 10);
        descriptors[slot] = descriptor;
    } else {
        drop(&session);
        if (!is_connected)
            volume->connections = 0;
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

/* A part of one sector, which the daemon takes whole only. (A SCSI command may carry less data than its blocks have.) */
static int transfer_part(struct descriptor *descriptor, enum vhost_request request, char *data, uint32_t length, uint64_t offset)
{
    char sector[VHOST_SECTOR];
    const uint32_t begin = (uint32_t)(offset % VHOST_SECTOR);
    const uint64_t start = offset - begin;
    int result;

    if (request == VHOST_READ) {
        if ((result = perform(descriptor, VHOST_READ, sector, VHOST_SECTOR, start)) == 0)
            memcpy(data, sector + begin, length);
        return result;
    }
    pthread_rwlock_wrlock(&descriptor->volume->writes);
    if ((result = perform(descriptor, VHOST_READ, sector, VHOST_SECTOR, start)) == 0) {
        memcpy(sector + begin, data, length);
        result = perform(descriptor, VHOST_WRITE, sector, VHOST_SECTOR, start);
    }
    const int error = errno;
    pthread_rwlock_unlock(&descriptor->volume->writes);
    errno = error;
    return result;
}

static int transfer_sectors(struct descriptor *descriptor, enum vhost_request request, char *data, uint32_t length, uint64_t offset)
{
    if (request != VHOST_READ)
        pthread_rwlock_rdlock(&descriptor->volume->writes);
    const int result = perform(descriptor, request, data, length, offset);
    const int error = errno;
    if (request != VHOST_READ)
        pthread_rwlock_unlock(&descriptor->volume->writes);
    errno = error;
    return result;
}

/* Any length, in pieces that the daemon takes. All of it or an error. */
static int transfer(int number, enum vhost_request request, char *data, uint64_t length, uint64_t offset)
{
    const uint32_t most = request == VHOST_WRITE_ZEROES ? VHOST_ZEROES : VHOST_DATA;
    int cancel_state, result = 0;
    struct descriptor *descriptor = enter(number, &cancel_state);

    if (!descriptor)
        return -1;
    if (request != VHOST_READ && !descriptor->writable) {
        errno = EBADF;
        result = -1;
    } else if (request == VHOST_WRITE_ZEROES && !descriptor->volume->server.writes_zeroes) {
        errno = EOPNOTSUPP;
        result = -1;
    } else if (request == VHOST_WRITE_ZEROES && (offset | length) % VHOST_SECTOR) {
        errno = EINVAL;
        result = -1;
    }
    for (uint32_t piece; length && result == 0; length -= piece, offset += piece) {
        const uint32_t begin = (uint32_t)(offset % VHOST_SECTOR);
        if (begin || length < VHOST_SECTOR) {
            piece = (uint32_t)MIN(VHOST_SECTOR - begin, length);
            result = transfer_part(descriptor, request, data, piece, offset);
        } else {
            piece = (uint32_t)MIN(most, length - length % VHOST_SECTOR);
            result = transfer_sectors(descriptor, request, data, piece, offset);
        }
        if (data)
            data += piece;
    }
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
        result = perform(descriptor, VHOST_FLUSH, NULL, 0, 0);
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
#define PLAIN_FDS (1 << 17) /* a LUN of an export takes 33, so those of files may be large */
static struct { _Atomic int calls; _Atomic int64_t last_call; } plain[PLAIN_FDS];

static void begin_plain(int fd)
{
    if (fd >= 0 && fd < PLAIN_FDS)
        plain[fd].calls++;
}

static void end_plain(int fd)
{
    if (fd >= 0 && fd < PLAIN_FDS) {
        plain[fd].last_call = milliseconds();
        plain[fd].calls--;
    }
}

#define PLAIN(call) ({ begin_plain(fd); __typeof__(call) result = call; end_plain(fd); result; })

static int close_plain(int fd)
{
    if (fd >= 0 && fd < PLAIN_FDS && plain[fd].last_call) {
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
    return transfer(fd, VHOST_READ, data, length, (uint64_t)offset) ? -1 : (ssize_t)length;
}
ssize_t pread64(int fd, void *data, size_t length, off64_t offset) ALIAS(pread);

EXPORTED ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    if (fd < FIRST_FD)
        return PLAIN(NEXT(pwrite)(fd, data, length, offset));
    return transfer(fd, VHOST_WRITE, (char *)data, length, (uint64_t)offset) ? -1 : (ssize_t)length;
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

/* Zeros that read back as zeros, with or without a hole: a discard would not promise that. */
EXPORTED int fallocate(int fd, int mode, off_t offset, off_t length)
{
    if (fd < FIRST_FD)
        return PLAIN(NEXT(fallocate)(fd, mode, offset, length));
    if (mode == (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) || (mode & ~FALLOC_FL_KEEP_SIZE) == FALLOC_FL_ZERO_RANGE)
        return transfer(fd, VHOST_WRITE_ZEROES, NULL, (uint64_t)length, (uint64_t)offset);
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
