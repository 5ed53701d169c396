//! Certificates for processes of the lab that are not agents, such as a waypoint.
//!
//! The agents' embedded CA takes over a root that already lies in its folder. So the lab makes the
//! root, by the `openssl` program, and signs with it what the agents must trust.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A certification authority in a folder: `root.pem` and `root.key`.
#[derive(Clone, Debug)]
pub struct Authority {
    directory: PathBuf,
}

/// Files of one signed certificate.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The leaf certificate, PEM.
    pub certificate: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
    /// The root that signed it, PEM.
    pub root: PathBuf,
}

/// What to put into a certificate.
#[derive(Clone, Debug)]
pub struct Subject<'s> {
    /// Subject alternative names as openssl writes them, such as `URI:spiffe://…`; empty for none.
    pub names: &'s str,
    /// Days of validity.
    pub days: u32,
}

impl Authority {
    /// Makes a root (ECDSA P-256, ten years) in `directory`.
    pub fn create(directory: &Path, trust_domain: &str) -> Result<Self> {
        fs::create_dir_all(directory).context("making the folder of the authority")?;
        let authority = Self { directory: directory.to_owned() };
        let (root, key) = (authority.root(), directory.join("root.key"));
        openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-sha256",
            "-nodes",
            "-keyout",
            text(&key)?,
            "-out",
            text(&root)?,
            "-days",
            "3650",
            "-subj",
            &format!("/O={trust_domain}"),
            "-addext",
            "basicConstraints=critical,CA:TRUE",
            "-addext",
            "keyUsage=critical,keyCertSign,cRLSign",
        ])?;
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
        Ok(authority)
    }

    /// The root certificate.
    pub fn root(&self) -> PathBuf {
        self.directory.join("root.pem")
    }

    /// Signs a certificate for the SPIFFE identity, and leaves it in `into` under `name`.
    pub fn sign_identity(&self, into: &Path, name: &str, identity: &str) -> Result<Signed> {
        self.sign(into, name, &Subject { names: &format!("URI:{identity}"), days: 1 })
    }

    /// Signs a certificate for server and client use.
    pub fn sign(&self, into: &Path, name: &str, subject: &Subject<'_>) -> Result<Signed> {
        fs::create_dir_all(into).context("making a folder for the certificate")?;
        let signed = Signed {
            certificate: into.join(format!("{name}.pem")),
            key: into.join(format!("{name}.key")),
            root: self.root(),
        };
        let (request, extensions) =
            (into.join(format!("{name}.csr")), into.join(format!("{name}.ext")));
        openssl(&[
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-sha256",
            "-nodes",
            "-keyout",
            text(&signed.key)?,
            "-out",
            text(&request)?,
            "-subj",
            "/",
        ])?;
        let mut wanted = String::from(
            "basicConstraints=critical,CA:FALSE\n\
             keyUsage=critical,digitalSignature\n\
             extendedKeyUsage=serverAuth,clientAuth\n",
        );
        if !subject.names.is_empty() {
            wanted.push_str(&format!("subjectAltName=critical,{}\n", subject.names));
        }
        fs::write(&extensions, wanted).context("writing certificate extensions")?;
        let days = subject.days.to_string();
        openssl(&[
            "x509",
            "-req",
            "-in",
            text(&request)?,
            "-CA",
            text(&self.root())?,
            "-CAkey",
            text(&self.directory.join("root.key"))?,
            "-CAcreateserial",
            "-CAserial",
            text(&into.join(format!("{name}.srl")))?,
            "-sha256",
            "-days",
            &days,
            "-extfile",
            text(&extensions)?,
            "-out",
            text(&signed.certificate)?,
        ])?;
        Ok(signed)
    }
}

fn openssl(arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).output().context("starting openssl")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("openssl {}: {}", arguments.join(" "), error.trim());
    }
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not text", path.display()))
}
