#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::sync::mpsc;
use tokio_seqpacket::UnixSeqpacket;

use super::*;

fn greeting(pid: u32) -> Greeting {
    Greeting {
        protocol: PROTOCOL,
        abi: 7,
        max_pods: 10,
        pins: (1, 2),
        netns: 3,
        pid,
        pod: "".into(),
        version: "1.2.3".into(),
    }
}

/// A running agent, and where it is asked.
struct Running {
    folder: tempfile::TempDir,
    asked: mpsc::Receiver<Asked>,
}

impl Running {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = Socket::bind(&folder.path().join("state/socket")).unwrap();
        let (sender, asked) = mpsc::channel(1);
        tokio::spawn(serve(socket, greeting(1), sender));
        Self { folder, asked }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("state/socket")
    }

    async fn found(&self) -> Predecessor {
        find(&self.path(), &greeting(2)).await.unwrap().unwrap()
    }
}

fn folder() -> File {
    File::open("/").unwrap()
}

fn nothing(pins: &File) -> Estate<'_> {
    Estate { pins: pins.as_fd(), pods: Vec::new(), servers: Vec::new() }
}

#[tokio::test]
async fn what_is_given_is_the_successors_once_it_has_taken_it() {
    let mut running = Running::new();
    let found = running.found().await;
    assert_eq!((found.greeting.pid, found.mismatch), (1, None));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let giving = async {
        let asked = running.asked.recv().await.unwrap();
        assert_eq!((asked.wish, asked.by.pid), (Wish::All, 2));
        let pins = folder();
        let estate = Estate { servers: vec![listener.as_fd()], ..nothing(&pins) };
        asked.give(&estate).await.unwrap();
        asked.yours().await.unwrap();
    };
    let taking = async {
        let mut bequest = found.ask().await.unwrap();
        assert!(bequest.pins.is_some() && bequest.pods.is_empty());
        assert_eq!(bequest.servers[0].local_addr().unwrap(), addr);
        bequest.take().await.unwrap();
    };
    tokio::join!(giving, taking);
}

#[tokio::test]
async fn nobody_is_found_where_there_is_no_socket_or_one_that_was_left() {
    let running = Running::new();
    assert!(find(&running.folder.path().join("none"), &greeting(2)).await.unwrap().is_none());
    let path = running.path();
    let Running { folder: _folder, asked } = running;
    drop(asked);
    let gone = async {
        while find(&path, &greeting(2)).await.unwrap().is_some() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(ANSWER_LIMIT, gone).await.unwrap();
}

#[tokio::test]
async fn successor_with_other_tables_is_only_let_in() {
    let mut running = Running::new();
    let newer = Greeting { abi: 8, ..greeting(2) };
    let found = find(&running.path(), &newer).await.unwrap().unwrap();
    let mismatch = found.mismatch.unwrap();
    assert_eq!((mismatch.old, mismatch.new), (7, 8));
    assert!(matches!(found.ask().await, Err(HandoverError::Refused(_))));

    let found = find(&running.path(), &newer).await.unwrap().unwrap();
    let letting_go = async {
        let asked = running.asked.recv().await.unwrap();
        assert_eq!(asked.wish, Wish::LetGo);
    };
    let (asked, ()) = tokio::join!(found.ask_to_let_go(), letting_go);
    asked.unwrap();
}

#[test]
fn any_difference_in_what_is_shared_is_a_mismatch() {
    let one = greeting(1);
    for other in [
        Greeting { protocol: 0, ..one.clone() },
        Greeting { abi: 0, ..one.clone() },
        Greeting { max_pods: 0, ..one.clone() },
    ] {
        assert!(one.mismatch(&other).is_some_and(|mismatch| mismatch.new == 0), "{other:?}");
    }
    let other = Greeting { netns: 0, version: "2".into(), pod: "other".into(), ..greeting(2) };
    assert_eq!(one.mismatch(&other), None);
    assert!(!one.is_of_same_pins(&Greeting { pins: (1, 3), ..other }));
}

#[tokio::test]
async fn predecessor_learns_of_a_successor_that_ends_before_it_takes() {
    let mut running = Running::new();
    let found = running.found().await;
    let giving = async {
        let asked = running.asked.recv().await.unwrap();
        let pins = folder();
        let gave = asked.give(&nothing(&pins)).await;
        assert!(matches!(gave, Err(HandoverError::Ended)), "{gave:?}");
    };
    let dying = async { drop(found.ask().await.unwrap()) };
    tokio::join!(giving, dying);
    // The next one is served as well.
    assert_eq!(running.found().await.greeting.pid, 1);
}

#[tokio::test]
async fn successor_goes_on_with_what_it_has_when_its_predecessor_ends() {
    let mut running = Running::new();
    let found = running.found().await;
    let dying = async { drop(running.asked.recv().await.unwrap()) };
    let (asked, ()) = tokio::join!(found.ask(), dying);
    let mut bequest = asked.unwrap();
    assert!(bequest.pins.is_none());
    bequest.take().await.unwrap();

    let found = running.found().await;
    let dying = async {
        let asked = running.asked.recv().await.unwrap();
        let pins = folder();
        asked.give(&nothing(&pins)).await.unwrap();
    };
    let taking = async { found.ask().await.unwrap().take().await };
    let ((), taken) = tokio::join!(dying, taking);
    taken.unwrap();
}

#[tokio::test]
async fn predecessor_that_gave_up_keeps_what_it_has() {
    let mut running = Running::new();
    let found = running.found().await;
    let refusing = async {
        let asked = running.asked.recv().await.unwrap();
        let pins = folder();
        let _ = asked.give(&nothing(&pins)).await;
        asked.refuse(&"too late").await;
    };
    let taking = async {
        let mut bequest = found.ask().await.unwrap();
        let taken = bequest.take().await;
        assert!(matches!(&taken, Err(HandoverError::Refused(why)) if why == "too late"));
    };
    tokio::join!(refusing, taking);
}

#[tokio::test]
async fn strange_bytes_are_refused_and_harm_nobody() {
    let running = Running::new();
    let huge = vec![b' '; 100 << 10];
    for bytes in [&b"\0\xff"[..], b"{}", br#"{"say":"take"}"#, br#"{"say":"hello"}"#, &huge] {
        let socket = UnixSeqpacket::connect(running.path()).await.unwrap();
        let sent = socket.send(bytes).await.unwrap();
        assert_eq!(sent, bytes.len());
        let mut answer = [0; 1024];
        let length = socket.recv(&mut answer).await.unwrap().bytes_read();
        let answer = Message::read(&answer[..length]).unwrap();
        assert!(matches!(answer, Message::Refused { .. }), "{answer:?}");
        assert_eq!(socket.recv(&mut [0; 8]).await.unwrap().bytes_read(), 0);
    }
    assert_eq!(running.found().await.greeting.pid, 1);
}

#[tokio::test]
async fn what_comes_without_being_promised_is_a_fault() {
    let pod = |uid: &str| PodTold {
        uid: uid.into(),
        names: None,
        cookie: 9,
        addresses: Vec::new(),
        descriptors: vec![Role::Netns],
    };
    let file = || folder().into();
    let hear = |message, descriptors| GivenPods::new(4).hear(message, descriptors);
    for (message, descriptors) in [
        (Message::Pins, Vec::new()),
        (Message::Pins, vec![file(), file()]),
        (Message::Pod(pod("no descriptor")), Vec::new()),
        (Message::Pod(pod("no namespace")), vec![file()]),
        (Message::Pod(PodTold { descriptors: vec![Role::Outbound], ..pod("x") }), vec![file()]),
        (Message::Pod(PodTold { descriptors: Vec::new(), ..pod("nothing") }), Vec::new()),
        (Message::Whole { pods: 1 }, Vec::new()),
        (Message::Whole { pods: 0 }, vec![file()]),
        (Message::Servers, vec![file()]),
        (Message::Yours, Vec::new()),
    ] {
        let text = format!("{message:?}");
        assert!(hear(message, descriptors).is_err(), "{text}");
    }
    assert_eq!(hear(Message::Whole { pods: 0 }, Vec::new()), Ok(true));
    let beyond = GivenPods::new(0).hear(Message::Pod(pod("one more")), vec![file()]);
    assert_eq!(beyond, Err(Fault::TooManyPods(0)));
}

#[tokio::test]
async fn socket_is_for_its_user_alone_and_takes_the_place_of_another() {
    let running = Running::new();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&running.path()), 0o600);
    assert_eq!(mode(running.path().parent().unwrap()), 0o700);
    let next = Socket::bind(&running.path()).unwrap();
    let (sender, _asked) = mpsc::channel(1);
    tokio::spawn(serve(next, greeting(5), sender));
    assert_eq!(running.found().await.greeting.pid, 5);
    let entries = fs::read_dir(running.path().parent().unwrap()).unwrap();
    assert_eq!(entries.count(), 1, "nothing is left beside it");
}

#[test]
fn unknown_fields_are_left_to_later_versions() {
    let text = r#"{"say":"hello","protocol":9,"abi":1,"max_pods":2,"pins":[3,4],"netns":5,"pid":6,"x":{"y":[]}}"#;
    let Message::Hello(greeting) = Message::read(text.as_bytes()).unwrap() else { panic!() };
    assert_eq!((greeting.protocol, greeting.version.as_str()), (9, ""));
}
