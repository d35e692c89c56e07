//! The writer's side of exact tracking: its mapping is registered with the kernel, and what tells of
//! writes through it is handed to the sender.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use serde_json::{Value, json};

use super::{ClientError, Connection, Marks};
use crate::name::Name;
use crate::region::Mapping;
use crate::sys::pagemap;
use crate::sys::uffd::Uffd;

/// A mapping of this process whose writes the kernel keeps account of.
///
/// What goes through the mapping is seen, whoever in this process writes it, also the kernel on its
/// behalf. Not seen is what reaches the memory another way: `write` to the file, a second mapping, a
/// forked child, a hole that is punched, a device with a buffer that was pinned before.
///
/// It holds the mapping, which therefore stays where it is. The sender has copies of the descriptors, so
/// tracking goes on there when this is dropped, as long as the memory stays mapped.
#[derive(Debug)]
pub struct Tracked {
    mapping: Arc<Mapping>,
    uffd: Uffd,
    pagemap: File,
}

impl Tracked {
    /// Has the kernel track `mapping`, from its first byte to its last. Needs Linux 6.7 and memory on
    /// tmpfs, on hugetlbfs or in a memfd.
    pub fn new(mapping: &Arc<Mapping>) -> io::Result<Self> {
        let uffd = Uffd::new()?;
        uffd.track(mapping)?;
        Ok(Self {
            mapping: Arc::clone(mapping),
            uffd,
            pagemap: pagemap::own()?,
        })
    }

    /// Where the mapping begins; 0 for one without bytes.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.mapping
            .address()
            .map_or(0, |base| base.addr().get() as u64)
    }
}

/// How a writer's changes are found.
#[derive(Debug)]
pub enum Tracking {
    /// The sender reads all of the memory in every pass.
    Scan,
    /// The kernel keeps account of what goes through a mapping.
    Pagemap(Tracked),
    /// The writer marks what it has written.
    Bitmap(Marks),
}

impl Connection {
    /// `region-add`: hands the sender `memory`, which for [`Tracking::Pagemap`] is the file that is mapped
    /// from its start, and what is needed to find what is written to it. `freeze` is as in `region-add`, for
    /// example `{"kind": "client"}`.
    pub fn register(
        &mut self,
        name: &Name,
        memory: BorrowedFd<'_>,
        tracking: &Tracking,
        freeze: Value,
    ) -> Result<(), ClientError> {
        // Not made from the Region's name: a descriptor's name may not begin with a digit, and must not
        // be longer than the longest name of a Region alone. They serve this one command.
        const MEMORY: &str = "region-memory";
        const PAGEMAP: &str = "region-pagemap";
        const UFFD: &str = "region-uffd";
        const MARKS: &str = "region-marks";
        self.send_fd(MEMORY, memory)?;
        let tracker = match tracking {
            Tracking::Scan => json!({"kind": "scan"}),
            Tracking::Pagemap(tracked) => {
                self.send_fd(PAGEMAP, tracked.pagemap.as_fd())?;
                self.send_fd(UFFD, tracked.uffd.as_fd())?;
                json!({
                    "kind": "pagemap",
                    "pagemap-fdname": PAGEMAP,
                    "uffd-fdname": UFFD,
                    "address": tracked.address(),
                })
            }
            Tracking::Bitmap(marks) => {
                self.send_fd(MARKS, marks.as_fd())?;
                json!({"kind": "bitmap", "fdname": MARKS})
            }
        };
        let region = json!({"name": name, "fdname": MEMORY, "tracker": tracker, "freeze": freeze});
        self.execute("region-add", region).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::io::Write;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::dirty::PagemapTracker;
    use crate::limits::PAGE_LEN;
    use crate::pages::PageSet;
    use crate::region::Access;
    use crate::sys::scm;

    /// Answers every command until there is a `region-add`; returns that and the named descriptors.
    fn serve(mut stream: UnixStream) -> (Value, HashMap<String, OwnedFd>) {
        stream.write_all(b"{\"QMP\":{}}\r\n").unwrap();
        let (mut unnamed, mut named) = (Vec::new(), HashMap::new());
        let (mut text, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE).unwrap();
            let got = scm::receive(stream.as_fd(), &mut buffer).unwrap();
            assert!(got.bytes > 0, "it hung up");
            unnamed.extend(got.fds);
            text.extend_from_slice(&buffer[..got.bytes]);
            let Ok(request) = serde_json::from_slice::<Value>(&text) else {
                continue;
            };
            text.clear();
            if request["execute"] == "getfd" {
                let name = request["arguments"]["fdname"].as_str().unwrap();
                named.insert(name.to_owned(), unnamed.remove(0));
            }
            writeln!(stream, "{}", json!({"return": {}, "id": request["id"]})).unwrap();
            if request["execute"] == "region-add" {
                return (request["arguments"].clone(), named);
            }
        }
    }

    #[test]
    fn what_is_registered_is_all_that_a_tracker_needs() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let daemon = thread::spawn(move || serve(listener.accept().unwrap().0));

        let memory = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        memory.set_len(8 * PAGE_LEN as u64).unwrap();
        let mapping = Mapping::new(&memory, 8 * PAGE_LEN, Access::Write).unwrap();
        let tracked = Tracking::Pagemap(Tracked::new(&mapping).unwrap());
        let name = Name::new("0ram").unwrap();
        let freeze = json!({"kind": "client"});
        let mut connection = Connection::connect(&path).unwrap();
        connection
            .register(&name, memory.as_fd(), &tracked, freeze.clone())
            .unwrap();

        let (region, mut fds) = daemon.join().unwrap();
        assert_eq!(
            (&region["name"], &region["freeze"]),
            (&json!("0ram"), &freeze)
        );
        let mut take = |member: &Value| fds.remove(member.as_str().unwrap()).unwrap();
        let handed = File::from(take(&region["fdname"]));
        assert_eq!(handed.metadata().unwrap().len(), 8 * PAGE_LEN as u64);
        let tracker = &region["tracker"];
        assert_eq!(tracker["kind"], "pagemap");
        let (pagemap, uffd) = (
            take(&tracker["pagemap-fdname"]),
            take(&tracker["uffd-fdname"]),
        );
        let address = tracker["address"].as_u64().unwrap();
        let bytes = mapping.len() as u64;
        let mut tracker = PagemapTracker::new(pagemap, uffd, address, bytes).unwrap();
        tracker.arm().unwrap();
        // Dropping it changes nothing for whoever has the descriptors.
        drop(tracked);
        mapping.span_mut(5 * PAGE_LEN, 1).unwrap().fill_from(&[1]);
        let mut owed = PageSet::empty(8);
        assert_eq!(tracker.harvest(&mut owed).unwrap(), 1);
        assert!(owed.contains(5));
    }
}
