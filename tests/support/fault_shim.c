/* Make file-system calls fail, as file systems do that lack something. Preloaded into a process of the tests:
 *
 *   LD_PRELOAD=fault_shim.so FAULTS=link=18,fsync_folder=22@images tinysd-batch submit ...
 *
 * FAULTS lists CALL=ERRNO, each optionally followed by @TEXT: the call fails only for paths that contain TEXT. Calls:
 * flock, flock_folder, fsync, fsync_folder, link, rename (the last two look at the new name).
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int fault(const char *call, const char *path) {
  char faults[1024];
  const char *given = getenv("FAULTS");
  snprintf(faults, sizeof faults, "%s", given ? given : "");
  for (char *rest = faults, *entry; (entry = strsep(&rest, ","));) {
    char *number = strchr(entry, '=');
    if (!number) continue;
    *number++ = 0;
    char *text = strchr(number, '@');
    if (text) *text++ = 0;
    if (strcmp(entry, call) == 0 && (!text || strstr(path, text))) return atoi(number);
  }
  return 0;
}

static int fault_of_handle(int handle, const char *for_file, const char *for_folder) {
  char link_name[64], path[PATH_MAX];
  struct stat status;
  snprintf(link_name, sizeof link_name, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link_name, path, sizeof path - 1);
  if (length < 0 || fstat(handle, &status) != 0) return 0;
  path[length] = 0;
  return fault(S_ISDIR(status.st_mode) ? for_folder : for_file, path);
}

static int failed(int error) {
  if (error) errno = error;
  return error;
}

int flock(int handle, int operation) {
  if (failed(fault_of_handle(handle, "flock", "flock_folder"))) return -1;
  return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(handle, operation);
}

int fsync(int handle) {
  if (failed(fault_of_handle(handle, "fsync", "fsync_folder"))) return -1;
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(handle);
}

int link(const char *old, const char *new) {
  if (failed(fault("link", new))) return -1;
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "link"))(old, new);
}

int linkat(int old_folder, const char *old, int new_folder, const char *new, int flags) {
  if (failed(fault("link", new))) return -1;
  return ((int (*)(int, const char *, int, const char *, int))dlsym(RTLD_NEXT, "linkat"))(
      old_folder, old, new_folder, new, flags);
}

int rename(const char *old, const char *new) {
  /* Only across folders: within one it works on every file system. */
  const char *end = strrchr(new, '/');
  size_t length = end ? (size_t)(end - new) + 1 : 0;
  if (strncmp(old, new, length) != 0 || strchr(old + length, '/')) {
    if (failed(fault("rename", new))) return -1;
  }
  return ((int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename"))(old, new);
}
