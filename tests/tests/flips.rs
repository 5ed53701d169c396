//! Policies that flip a hundred times a second under connections that the kernel admits: of those that
//! begin and end while the agent has acknowledged that they are denied, not one is served.
//!
//! `FLIPS_SECONDS` is how long it goes on; an hour is millions of connections.

#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use culvert_lab::mesh::{Mesh, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_proto::istio::security::string_match::MatchType;
use culvert_proto::istio::security::{Authorization, Clause, Match, Rule, StringMatch};
use culvert_tests::cluster::Cluster;
use culvert_tests::control::World;
use culvert_tests::direct::{Lateness, Stream, opened, warm};
use culvert_tests::{LIMIT, connect, echo, serve};
use socket2::SockRef;

const PORT: u16 = 8080;
/// Where connections are held open.
const HELD: u16 = 8081;
/// How long a policy stays, once it is acknowledged.
const WINDOW: Duration = Duration::from_millis(5);
/// Every so often it stays until what it denies has ended.
const REST_EVERY: u64 = 50;

fn no_client() -> Authorization {
    let client = MatchType::Exact("cluster.local/ns/web/sa/client".to_owned());
    let client = StringMatch { match_type: Some(client) };
    let is_client = Match { principals: vec![client], ..Match::default() };
    Authorization {
        name: "no-client".to_owned(),
        namespace: "shop".to_owned(),
        scope: 1,
        action: 1,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![is_client] }] }],
        ..Authorization::default()
    }
}

/// What is known of the policy: the number of the flip, odd while it is certain that it denies.
#[derive(Default)]
struct Watch {
    flip: AtomicU64,
    stop: AtomicBool,
}

/// Connections, by what was known from their beginning to their end.
#[derive(Debug, Default)]
struct Tally {
    denied: u64,
    /// Of these: what must never happen.
    served_though_denied: u64,
    others: u64,
    served: u64,
}

impl std::ops::AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.denied += other.denied;
        self.served_though_denied += other.served_though_denied;
        self.others += other.others;
        self.served += other.served;
    }
}

/// One connection, which counts as served when the application has answered.
fn is_served(to: SocketAddr) -> bool {
    let once = || -> io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        // Nothing is left waiting, or the ports would not last.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.write_all(b"x")?;
        Ok(stream.read(&mut [0])? == 1)
    };
    once().unwrap_or(false)
}

fn hammer(mesh: &Running, to: SocketAddr, watch: &Arc<Watch>) -> JoinHandle<Tally> {
    let (netns, watch) = (mesh.pod("client").place().netns().clone(), watch.clone());
    std::thread::spawn(move || {
        netns.run(|| {
            let mut tally = Tally::default();
            while !watch.stop.load(Ordering::Relaxed) {
                let before = watch.flip.load(Ordering::SeqCst);
                let served = is_served(to);
                let denied = before % 2 == 1 && watch.flip.load(Ordering::SeqCst) == before;
                if denied {
                    tally.denied += 1;
                    tally.served_though_denied += u64::from(served);
                } else {
                    tally.others += 1;
                    tally.served += u64::from(served);
                }
            }
            tally
        })
    })
}

/// Changes the policies, and waits until the agent has acknowledged it.
fn flip(world: &World, change: impl FnOnce(&World)) {
    let before = world.accepted();
    change(world);
    let limit = Instant::now() + wait::SOON;
    while world.accepted() == before {
        assert!(Instant::now() < limit, "not acknowledged");
        std::thread::park_timeout(Duration::from_micros(100));
    }
}

#[test]
fn nothing_is_served_that_is_known_to_be_denied() {
    let seconds = std::env::var("FLIPS_SECONDS").map_or(12, |text| text.parse().unwrap());
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "near")
        .service(ServiceSpec::new("near", "shop").port(80, PORT).endpoint("near"))
        // The control plane is on the first node's address, which is one of its link to another.
        .node("b");
    let (mesh, cluster) = Cluster::start(mesh, false).unwrap();
    serve(&mesh, "near", PORT, |mut stream, _| {
        if let Ok(1) = stream.read(&mut [0]) {
            // It may have been cut off.
            let _ = stream.write_all(b"y");
            let _ = stream.read(&mut [0]);
        }
    })
    .unwrap();
    serve(&mesh, "near", HELD, echo).unwrap();
    let agent = cluster.culvert(&mesh, "a").unwrap();
    let to = mesh.pod("near").addresses().map(|ip| (ip, PORT));
    let to = [to, mesh.service("near").map(|ip| (ip, 80))].concat();
    let held = (mesh.pod("near").addresses()[0], HELD);
    for to in to.iter().chain([&held]) {
        warm(&mesh, &agent, "client", *to).unwrap();
    }
    let world = cluster.plane(|plane| plane.world.clone()).unwrap();
    let policy = no_client();
    let watch = Arc::new(Watch::default());
    let hammers: Vec<_> = to.iter().map(|to| hammer(&mesh, (*to).into(), &watch)).collect();
    let direct = opened(&agent).unwrap();
    let begun = Instant::now();
    let (mut flips, mut ended) = (0_u64, 0);
    while begun.elapsed() < Duration::from_secs(seconds) {
        let rests = flips % REST_EVERY == 0;
        let live = rests.then(|| {
            warm(&mesh, &agent, "client", held).unwrap();
            [(); 2].map(|()| Stream::start(&mesh, "client", held).unwrap())
        });
        flip(&world, |world| world.put_policy(&policy));
        watch.flip.fetch_add(1, Ordering::SeqCst);
        if let Some(live) = live {
            let over = || live.iter().all(Stream::is_finished);
            wait::until("the end of what is denied", wait::SOON, over).unwrap();
            ended += live.len();
            live.into_iter().for_each(|stream| assert!(stream.stop().is_err()));
        }
        std::thread::park_timeout(WINDOW);
        watch.flip.fetch_add(1, Ordering::SeqCst);
        flip(&world, |world| world.remove_policy("shop/no-client"));
        std::thread::park_timeout(WINDOW);
        flips += 2;
    }
    watch.stop.store(true, Ordering::Relaxed);
    let mut tally = Tally::default();
    hammers.into_iter().for_each(|hammer| tally += hammer.join().unwrap());
    let direct = opened(&agent).unwrap() - direct;
    let late = Lateness::of(&agent).unwrap();
    let rate = flips as f64 / begun.elapsed().as_secs_f64();
    eprintln!("{flips} flips, {rate:.0} a second; {tally:?}, {direct} straight; {late:?}");
    assert_eq!(tally.served_though_denied, 0, "{tally:?}");
    // It was a hunt.
    assert!(flips >= 20 && tally.denied >= 50 && tally.served >= 50, "{flips} flips, {tally:?}");
    assert!(direct >= 50.0, "{direct} went straight");
    assert!(late.count >= ended as f64 && late.within_a_second >= late.count * 0.9, "{late:?}");
    drop(connect(&mesh, "client", held));
}
