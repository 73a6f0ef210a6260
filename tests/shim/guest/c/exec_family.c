/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec_family.c MEMBER PROGRAM MODE - starts PROGRAM through one member of the exec family, with an environment that holds
 * what MODE says: `fresh` (only OWN=1), `null` (none at all), `theirs` (values of its own), `off` (VGPU_EXEC=0), `huge` (more
 * than the library keeps on the stack). The members that take no environment get it as `environ`.
 */
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static char *huge[20001];

static char **make_environment(const char *mode)
{
    static char *fresh[] = {"OWN=1", NULL};
    static char *theirs[] = {"LD_LIBRARY_PATH=/theirs:/more", "OWN=1", "LD_PRELOAD=", "VGPU_VM=theirs", NULL};
    static char *off[] = {"VGPU_EXEC=0", "OWN=1", NULL};
    if (strcmp(mode, "null") == 0) return NULL;
    if (strcmp(mode, "theirs") == 0) return theirs;
    if (strcmp(mode, "off") == 0) return off;
    if (strcmp(mode, "huge") == 0) {
        for (size_t i = 0; i < 20000; i++) huge[i] = i == 0 ? "OWN=1" : "X=1";
        return huge;
    }
    return fresh;
}

static int waited(pid_t child)
{
    int status;
    if (child < 0 || waitpid(child, &status, 0) < 0) return 99;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 98;
}

int main(int count, char **arguments)
{
    if (count != 4) return 2;
    const char *member = arguments[1], *program = arguments[2];
    const char *slash = strrchr(program, '/');
    char *argv[] = {"child", "a", "b", NULL}, **environment = make_environment(arguments[3]);
    char folder[4096];
    snprintf(folder, sizeof folder, "%.*s", (int)(slash - program), program);
    setenv("PATH", folder, 1); /* for the members that search */
    char path_entry[5000];
    snprintf(path_entry, sizeof path_entry, "PATH=%s", folder);
    /* The members that take the process's own environment, and search PATH in it. */
    static char *with_path[20003];
    size_t n = 0;
    for (; environment != NULL && environment[n] != NULL; n++) with_path[n] = environment[n];
    with_path[n] = path_entry;
    const char *name = slash + 1;

    if (strcmp(member, "execve") == 0) execve(program, argv, environment);
    else if (strcmp(member, "execvpe") == 0) execvpe(name, argv, environment);
    else if (strcmp(member, "execle") == 0) execle(program, "child", "a", "b", (char *)NULL, environment);
    else if (strcmp(member, "fexecve") == 0) fexecve(open(program, O_RDONLY | O_CLOEXEC), argv, environment);
    else if (strcmp(member, "execveat") == 0) execveat(AT_FDCWD, program, argv, environment, 0);
    else if (strcmp(member, "execveat-empty") == 0) execveat(open(program, O_PATH | O_CLOEXEC), "", argv, environment, AT_EMPTY_PATH);
    else if (strcmp(member, "posix_spawn") == 0) {
        pid_t child;
        return posix_spawn(&child, program, NULL, NULL, argv, environment) != 0 ? 97 : waited(child);
    } else if (strcmp(member, "posix_spawnp") == 0) {
        pid_t child;
        return posix_spawnp(&child, name, NULL, NULL, argv, environment) != 0 ? 97 : waited(child);
    } else if (strcmp(member, "vfork") == 0) {
        pid_t child = vfork();
        if (child == 0) {
            execve("/nonexistent/first", argv, environment); /* a search that fails at first */
            execve(program, argv, environment);
            _exit(96);
        }
        return waited(child);
    } else {
        environ = with_path;
        if (strcmp(member, "execv") == 0) execv(program, argv);
        else if (strcmp(member, "execvp") == 0) execvp(name, argv);
        else if (strcmp(member, "execl") == 0) execl(program, "child", "a", "b", (char *)NULL);
        else if (strcmp(member, "execlp") == 0) execlp(name, "child", "a", "b", (char *)NULL);
        else if (strcmp(member, "system") == 0 || strcmp(member, "popen") == 0) {
            char command[5000];
            snprintf(command, sizeof command, "exec %s a b", name);
            if (member[0] == 's') {
                int status = system(command);
                return WIFEXITED(status) ? WEXITSTATUS(status) : 95;
            }
            FILE *stream = popen(command, "r");
            if (stream == NULL) return 94;
            for (int c; (c = fgetc(stream)) != EOF;) putchar(c);
            int status = pclose(stream);
            return WIFEXITED(status) ? WEXITSTATUS(status) : 95;
        }
    }
    perror(member);
    return 93;
}
