//! Process-wide settings of the host: the allocator's thresholds and how a process ends.

/// Memory of this size and more goes back to the system when it is freed; smaller ones are kept for the next. Unit: bytes.
pub const MAPPED: usize = 32 << 20;

/// Lets glibc keep freed memory instead of giving it back after every tensor.
///
/// By default every tensor above 128 KiB is a fresh mapping: zeroed by the kernel on first touch and unmapped on free. A
/// training step allocates the same sizes again and again; with these settings those below [`MAPPED`] are reused. Larger ones
/// stay mappings: kept in the heap, buffers whose size changes from step to step would tear it into holes.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets two integers; it is called before other threads exist.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED as i32);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}

/// Allows this process as many open files as the system lets it: a checkpoint of a thousand ranks has a thousand files.
pub fn raise_open_files() {
    // SAFETY: the limits are plain old data, filled by the first call and read by the second.
    unsafe {
        let mut limit: libc::rlimit = std::mem::zeroed();
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
        }
    }
}

/// Gives freed memory that was kept back to the system.
pub fn give_back_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator locks itself; memory that is in use is not touched.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Largest resident set of this process so far, in bytes.
pub fn peak_resident_bytes() -> u64 {
    // SAFETY: rusage is plain old data and is filled by the call.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage.ru_maxrss as u64 * 1024
    }
}

/// Resident set of this process now, in bytes; 0 where the system does not say.
pub fn resident_bytes() -> u64 {
    let Ok(text) = std::fs::read_to_string("/proc/self/statm") else { return 0 };
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    // SAFETY: asks for a number.
    pages * u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096)
}

/// Time that this process has had cores for, all threads together. Unit: seconds.
pub fn cpu_seconds() -> f64 {
    // SAFETY: the clock is plain old data and is filled by the call.
    unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    }
}

/// Lets [`peak_resident_bytes`] count from now on; false where the system does not.
pub fn forget_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// Asks the system to drop a file's clean pages from its cache; it may not.
pub fn drop_from_cache(file: &std::fs::File) {
    use std::os::fd::AsRawFd;
    // SAFETY: an open file; the call only advises.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// Tells the system to begin writing a part of a file to disk, and goes on; a system that cannot loses nothing but the head start.
pub fn begin_to_write(file: &std::fs::File, part: std::ops::Range<u64>) {
    #[cfg(target_os = "linux")]
    {
        use std::os::fd::AsRawFd;
        let (start, len) = (part.start as i64, (part.end - part.start) as i64);
        // SAFETY: an open file; the call only asks for write-back.
        unsafe { libc::sync_file_range(file.as_raw_fd(), start, len, libc::SYNC_FILE_RANGE_WRITE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (file, part);
}

/// Asks for large pages where memory that is about to be filled has room for them: a fault for each 2 MiB instead of each 4 KiB.
pub fn prefer_large_pages(memory: &mut [u8]) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let start = memory.as_ptr().align_offset(LARGE);
        let len = memory.len().saturating_sub(start) / LARGE * LARGE;
        if len > 0 {
            // SAFETY: the range lies inside the slice; the advice changes no contents.
            unsafe { libc::madvise(memory[start..].as_mut_ptr().cast(), len, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// The cores that this process may run on; empty where the system does not say (or has more than 1024).
pub fn allowed_cores() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    // SAFETY: the set is plain old data of the size that is passed, and is read only after the call filled it.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) == 0 {
            return (0..libc::CPU_SETSIZE as usize).filter(|&core| libc::CPU_ISSET(core, &set)).collect();
        }
    }
    Vec::new()
}

/// Lets this thread, and those that it starts from here on, run on `cores` only; says whether the system agreed.
#[cfg(target_os = "linux")]
pub fn bind(cores: &[usize]) -> bool {
    // SAFETY: the set is plain old data of the size that is passed; numbers beyond it are left out.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().filter(|&&core| core < libc::CPU_SETSIZE as usize).for_each(|&core| libc::CPU_SET(core, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) == 0
    }
}

/// Elsewhere threads go where the system puts them.
#[cfg(not(target_os = "linux"))]
pub fn bind(_: &[usize]) -> bool {
    false
}

/// Sets an environment variable for libraries that read theirs when they are first called.
///
/// Call it from the main thread before such a library starts threads of its own.
pub fn set_variable(name: &str, value: &str) {
    // SAFETY: at this point no other thread of the process reads or changes the environment; see above.
    unsafe { std::env::set_var(name, value) };
}

/// Ends this process at once: nothing is run any more that could wait for a device or for other ranks.
pub fn end_now(code: i32) -> ! {
    // SAFETY: the call does not return and touches no memory of ours.
    unsafe { libc::_exit(code) }
}

/// Soft limits of this process on memory that it may lock and on files that it may open; None: unlimited.
pub fn limits() -> (Option<u64>, Option<u64>) {
    let limit = |which| {
        let mut both = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: one out parameter, plain old data.
        let known = unsafe { libc::getrlimit(which, &raw mut both) } == 0;
        (known && both.rlim_cur != libc::RLIM_INFINITY).then_some(both.rlim_cur)
    };
    (limit(libc::RLIMIT_MEMLOCK), limit(libc::RLIMIT_NOFILE))
}

/// Whether standard error is a terminal.
pub fn stderr_is_terminal() -> bool {
    use std::io::IsTerminal;
    std::io::stderr().is_terminal()
}
